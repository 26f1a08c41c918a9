"""What drafts bring for one stream, by the kind of text: the same answer written with and without them, in turns.

    python -m tests.bench.drafts                       one thread on each core
    TANDEM_ISA=avx512 python -m tests.bench.drafts     as on a lesser processor

Both must say the same tokens, or the bench fails.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

from engine.core import Request, SamplingParams, Sequence, Step
from engine.drafts import Drafter, count_accepted
from engine.run.local import LocalExecutor
from engine.text.tokenizer import Tokenizer
from tests.bench.load import text_of
from tests.bench.questions import question_of
from tests.bench.report import machine, table

BLOCK_SIZE = 16
PASSAGE = (
    "The heron stood in the shallow water at the edge of the reeds and did not move. Fishermen along the canal say "
    "that it has come to the same place every morning for eleven years, since the mill was closed and the water became "
    "clear again. The council wants to build a footbridge there. Two hundred people have signed a letter against the "
    "footbridge, and the fishermen have put up a sign that asks walkers to keep their dogs away from the reeds."
)
TEMPERATURES = (0.0, 0.7)
NUM_TEXTS = 4  # of each kind whose texts differ


@dataclass(frozen=True, slots=True)
class Text:
    kind: str
    prompt: str
    is_chat: bool = True


@dataclass(frozen=True, slots=True)
class Written:
    tokens: list[int]
    seconds: float
    steps: int


def texts() -> Iterator[Text]:
    for number in range(NUM_TEXTS):
        yield Text("random words", text_of(16, str(number)), is_chat=False)
        yield Text("a question", question_of(str(number)))
    yield Text("a summary", f"Summarize this passage in three sentences.\n\n{PASSAGE}")
    yield Text("a correction", f"Repeat this passage, but write 'egret' for 'heron'.\n\n{PASSAGE}")
    yield Text("a program", "Write a Python class for a queue, and tests for it.")


class Writer:
    def __init__(self, model: str, threads: int | None) -> None:
        self.executor = LocalExecutor(model, block_size=BLOCK_SIZE, num_threads=threads)
        self.tokenizer = Tokenizer.load(model)
        self.num_blocks = self.executor.max_model_len // BLOCK_SIZE
        self.pool = bytearray(self.executor.layout(self.num_blocks).pool_bytes)
        self.executor.attach(self.pool)

    def tokens_of(self, text: Text) -> list[int]:
        template = self.tokenizer.template
        if not text.is_chat or template is None:
            return self.tokenizer.encode(text.prompt, add_special_tokens=True)
        chat = template.render([{"role": "user", "content": text.prompt}])
        return self.tokenizer.encode(chat, add_special_tokens=False)

    def write(self, prompt: list[int], count: int, temperature: float, most: int) -> Written:
        """The first token's time does not count."""
        sampling = SamplingParams(max_tokens=count, seed=5, temperature=temperature, top_p=0.95)
        sequence = Sequence.of(Request(id="text", prompt=prompt, sampling=sampling), arrival=0.0)
        sequence.block_table = list(range(self.num_blocks))
        drafter = Drafter(most)
        self._step(sequence, len(prompt), drafter)
        began, steps = time.perf_counter(), 0
        while sequence.num_output < count:
            self._step(sequence, 1, drafter)
            steps += 1
        return Written(sequence.tokens[len(prompt) :], time.perf_counter() - began, steps)

    def _step(self, sequence: Sequence, num_new: int, drafter: Drafter) -> None:
        """As the engine does it."""
        draft = drafter.draft(sequence, self.executor.draft_rows - 1) if num_new == 1 else []
        sampled = self.executor.execute(Step([sequence], [num_new], {0: draft} if draft else {})).tokens
        accepted = count_accepted(draft, sampled)
        sequence.tokens += sampled[: accepted + 1]
        sequence.num_computed += num_new + accepted
        if draft:
            drafter.settle(sequence, len(draft), accepted)


@dataclass(frozen=True, slots=True)
class Pair:
    """One text's answer without and with drafts."""

    plain: Written
    drafted: Written

    @property
    def gain(self) -> float:
        return self.plain.seconds / self.drafted.seconds


def compared(writer: Writer, text: Text, args: argparse.Namespace, temperature: float) -> Pair:
    """The fastest of so many rounds each."""
    prompt = writer.tokens_of(text)
    pairs = [
        [writer.write(prompt, args.tokens, temperature, most) for most in (0, args.max_draft_tokens)]
        for _ in range(args.rounds)
    ]
    plain, drafted = (min(written, key=lambda one: one.seconds) for written in zip(*pairs, strict=True))
    if plain.tokens != drafted.tokens:
        raise SystemExit(f"drafts changed the answer to {text.prompt[:60]!r}")
    return Pair(plain, drafted)


def line(kind: str, pairs: list[Pair], args: argparse.Namespace) -> list[str]:
    gains = sorted(pair.gain for pair in pairs)
    spread = f" ({gains[0]:.2f} to {gains[-1]:.2f})" if len(gains) > 1 else ""
    steps = sum(pair.drafted.steps for pair in pairs) / sum(pair.plain.steps for pair in pairs)
    per_token = [
        1e3 * statistics.median(one.seconds for one in written) / args.tokens
        for written in ([pair.plain for pair in pairs], [pair.drafted for pair in pairs])
    ]
    return [kind, *(f"{value:.2f}" for value in per_token), f"{steps:.2f}", f"{statistics.median(gains):.2f}{spread}"]


def main() -> None:
    args = parse()
    writer = Writer(args.model, args.threads)
    lines = []
    for temperature in TEMPERATURES:
        found: dict[str, list[Pair]] = {}
        for text in texts():
            found.setdefault(text.kind, []).append(compared(writer, text, args, temperature))
        lines += [line(f"{kind}, temperature {temperature}", pairs, args) for kind, pairs in found.items()]
        print(f"temperature {temperature} done", flush=True)
    print(f"\n{machine()}. {args.tokens} tokens, the fastest of {args.rounds} rounds in turn; all answers the same.\n")
    print(table(["one stream", "ms per token", "with drafts", "steps", "times as fast"], lines))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="default: one for each core")
    parser.add_argument("--tokens", type=int, default=200, help="of an answer (default: %(default)s)")
    parser.add_argument("--max-draft-tokens", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=2, help="default: %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    main()
