"""The executor on the bundled model: what it promises to the engine core, and that its KV can move between pools."""

from __future__ import annotations

import gc
import mmap
from typing import Any

import pytest

from engine.core import Request, SamplingParams, Sequence, Step
from engine.models.errors import ModelLoadError
from engine.run.executor import blocks_within
from engine.run.local import LocalExecutor
from kernels import cpu

BLOCK_SIZE = 16
PROMPT = [token * 7919 % 49152 for token in range(50)]


@pytest.fixture(scope="module")
def executor() -> LocalExecutor:
    return LocalExecutor("smollm2", served_name="small", dtype="float32", block_size=BLOCK_SIZE, max_model_len=100)


def sequence(blocks: list[int], prompt: list[int] = PROMPT, **wishes: Any) -> Sequence:
    sampling = SamplingParams(max_tokens=10, seed=11, **wishes)
    found = Sequence.of(Request(id="test", prompt=prompt, sampling=sampling), arrival=0.0)
    found.block_table = blocks
    return found


def advance(executor: LocalExecutor, rows: list[Sequence], num_new: list[int]) -> None:
    """One step, and what the engine does after it."""
    step = Step(rows, num_new)
    sampled = [i for i in range(len(rows)) if step.samples(i)]
    output = executor.execute(step)
    for i, count in enumerate(num_new):
        rows[i].num_computed += count
    for i, token in zip(sampled, output.tokens, strict=True):
        rows[i].tokens.append(token)


def generate(executor: LocalExecutor, row: Sequence, count: int, chunk: int = 1000) -> list[int]:
    while row.num_output < count:
        advance(executor, [row], [min(chunk, row.num_missing)])
    return row.tokens[row.prompt_length :]


def pool_for(executor: LocalExecutor, num_blocks: int) -> bytearray:
    return bytearray(executor.layout(num_blocks).pool_bytes)


def test_the_model_describes_itself(executor: LocalExecutor) -> None:
    info = executor.model_info(num_blocks=9)
    assert (info.name, info.max_model_len, info.num_blocks, info.block_size) == ("small", 100, 9, BLOCK_SIZE)
    assert (info.vocab_size, info.eos_token_ids, info.dtype) == (49152, (2,), "float32")
    assert info.num_parameters == 134_515_008
    assert info.load_seconds > 0


@pytest.mark.parametrize("wishes", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}])
def test_chunks_preemption_and_company_change_no_token(executor: LocalExecutor, wishes: dict[str, Any]) -> None:
    executor.attach(pool_for(executor, 20))
    expected = generate(executor, sequence([3, 1, 4, 15], **wishes), 10)
    assert generate(executor, sequence([9, 2, 6, 5], **wishes), 10, chunk=7) == expected
    preempted = sequence([7, 8, 10, 11], **wishes)
    generate(executor, preempted, 4)
    preempted.num_computed, preempted.block_table = 0, [12, 13, 14, 16]
    assert generate(executor, preempted, 10) == expected
    accompanied, other = sequence([3, 1, 4, 15], **wishes), sequence([0, 17, 18], prompt=PROMPT[:30], temperature=1.0)
    while accompanied.num_output < 10:
        advance(executor, [other, accompanied], [min(5, other.num_missing), min(9, accompanied.num_missing)])
    assert accompanied.tokens[accompanied.prompt_length :] == expected


@pytest.mark.skipif(not cpu.NATIVE, reason=cpu.REASON)
@pytest.mark.parametrize(
    "wishes",
    [{"temperature": 0.0}, {"temperature": 1.0, "logprobs": 2}, {"temperature": 0.8, "frequency_penalty": 1.5}],
)
def test_after_each_drafted_token_the_next_is_sampled_as_if_it_were_said(
    executor: LocalExecutor, wishes: dict[str, Any]
) -> None:
    executor.attach(pool_for(executor, 8))
    expected = generate(executor, sequence([6, 2, 5, 7], **wishes), 10)
    row = sequence([1, 0, 4, 3], **wishes)
    generate(executor, row, 1)
    step = Step([row], [1], {0: [*expected[1:5], expected[5] + 1, 0]})
    assert executor.execute(step).tokens[:5] == expected[1:6]
    assert generate(executor, row, 10) == expected  # what was drafted wrongly leaves no trace


def test_kv_bytes_moved_into_another_pool_go_on_there(executor: LocalExecutor) -> None:
    ours, theirs, block_bytes = pool_for(executor, 8), pool_for(executor, 6), executor.layout(1).block_bytes
    executor.attach(ours)
    giver = sequence([6, 2, 5, 7], temperature=1.0)
    expected = generate(executor, giver, 10)
    for source, destination in zip([6, 2, 5, 7], [1, 0, 4, 3], strict=True):
        block = ours[source * block_bytes : (source + 1) * block_bytes]
        theirs[destination * block_bytes : (destination + 1) * block_bytes] = block
    executor.attach(theirs)
    taker = sequence([1, 0, 4, 3], temperature=1.0)
    taker.tokens.append(expected[0])
    taker.num_computed = taker.prompt_length
    assert generate(executor, taker, 10) == expected


def test_a_row_that_does_not_catch_up_samples_nothing(executor: LocalExecutor) -> None:
    executor.attach(pool_for(executor, 4))
    assert executor.execute(Step([sequence([0, 1, 2, 3])], [20])).tokens == []


def test_warming_up_needs_one_block_alone(executor: LocalExecutor) -> None:
    executor.attach(pool_for(executor, 1))
    executor.warm_up()


def test_a_detached_pool_can_be_unmapped(executor: LocalExecutor) -> None:
    memory = mmap.mmap(-1, executor.layout(2).pool_bytes)
    executor.attach(memory)
    executor.warm_up()
    executor.detach()
    executor.detach()
    gc.collect()
    memory.close()  # raises BufferError while anyone still looks at it


def test_memory_that_is_no_pool_is_refused(executor: LocalExecutor) -> None:
    size = executor.layout(1).pool_bytes
    for memory in (bytearray(size - 1), bytearray(0), memoryview(bytes(size))):
        with pytest.raises(ValueError, match="whole blocks"):
            executor.attach(memory)


def test_a_budget_of_bytes_becomes_whole_blocks(executor: LocalExecutor) -> None:
    block_bytes = executor.layout(1).block_bytes
    assert blocks_within(executor, 3 * block_bytes + 5) == 3
    with pytest.raises(ValueError, match="holds no block"):
        blocks_within(executor, block_bytes - 1)


def test_a_length_beyond_the_model_is_refused() -> None:
    with pytest.raises(ModelLoadError, match="1 to 8192 tokens"):
        LocalExecutor("smollm2", max_model_len=8193)


def test_the_thread_count_is_the_callers() -> None:
    if not cpu.NATIVE:
        pytest.skip(cpu.REASON)
    from kernels.threads import num_threads

    LocalExecutor("smollm2", num_threads=1)
    assert num_threads() == 1
