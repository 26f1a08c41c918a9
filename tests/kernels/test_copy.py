"""The native copy is the reference, byte for byte, on every instruction set; and the package knows what it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kernels import cpu, reference

native = pytest.mark.skipif(not cpu.NATIVE, reason=cpu.REASON)
SIZE = 1 << 20

Copies = NDArray[np.int64]
CopyRanges = Callable[[memoryview, memoryview, Copies], None]
ISAS = ["generic", "sse2", "avx2", "avx512", "avx512_bf16", "amx"]  # csrc/isa.h, in its order


def random_bytes(seed: int, size: int = SIZE) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def ranges(*rows: tuple[int, int, int]) -> Copies:
    return np.array(rows, np.int64).reshape(-1, 3)


def same_as_reference(copies: Copies) -> None:
    source, before = random_bytes(1), random_bytes(2)
    fast, slow = before.copy(), before.copy()
    cpu.copy_ranges(source.data, fast.data, copies)
    reference.copy_ranges(source.data, slow.data, copies)
    assert np.array_equal(fast, slow)


row = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE), st.one_of(st.integers(0, 200), st.integers(0, SIZE))).map(
    lambda r: (r[0], r[1], min(r[2], SIZE - r[0], SIZE - r[1]))
)


@native
@settings(max_examples=100, deadline=None)
@given(st.lists(row, max_size=20))
def test_any_ranges_are_copied_as_the_reference_does(rows: list[tuple[int, int, int]]) -> None:
    same_as_reference(ranges(*rows))


@native
@pytest.mark.parametrize("offset", [0, 1, 63, 64, 65])
@pytest.mark.parametrize("length", [4096 * 4, 4096 * 64 + 1, 4096 * 67 + 63, SIZE - 128])
def test_long_ranges_at_any_alignment(offset: int, length: int) -> None:
    same_as_reference(ranges((7, offset, length), (offset, 0, length)))


@native
@pytest.mark.parametrize("isa", ISAS[: ISAS.index(cpu.isa())] if cpu.isa() in ISAS else [])
def test_every_lesser_instruction_set_of_this_machine(isa: str) -> None:
    done = run_python("-m", "pytest", "-q", __file__, "-k", "alignment or in_use", environment={"TANDEM_ISA": isa})
    assert done.returncode == 0, done.stdout


def test_the_instruction_set_in_use_is_the_one_asked_for() -> None:
    assert cpu.isa() == os.environ.get("TANDEM_ISA", cpu.isa())


@pytest.mark.parametrize("copy_ranges", [cpu.copy_ranges, reference.copy_ranges])
@pytest.mark.parametrize(
    "bad",
    [
        (-1, 0, 1),
        (0, -1, 1),
        (0, 0, -1),
        (SIZE, 0, 1),
        (0, SIZE, 1),
        (0, 0, SIZE + 1),
        (1, 0, 2**63 - 1),
        (2**63 - 1, 0, 2),
        (0, 2**63 - 1, 2**63 - 1),
    ],
)
def test_a_range_outside_is_refused_and_nothing_is_copied(copy_ranges: CopyRanges, bad: tuple[int, int, int]) -> None:
    source, destination = random_bytes(1), np.zeros(SIZE, np.uint8)
    with pytest.raises(ValueError, match="outside"):
        copy_ranges(source.data, destination.data, ranges((0, 0, 100), bad))
    assert not destination.any()


@native
def test_a_read_only_buffer_is_a_source_but_no_destination() -> None:
    source, destination = b"x" * 100, bytearray(100)
    cpu.copy_ranges(memoryview(source), memoryview(destination), ranges((0, 0, 100)))
    assert destination == source
    with pytest.raises(TypeError):
        cpu.copy_ranges(memoryview(destination), memoryview(source), ranges((0, 0, 100)))


@native
@pytest.mark.parametrize("copies", [np.zeros((2, 2), np.int64), np.zeros((2, 3), np.int32), np.zeros(3, np.int64)])
def test_copies_of_another_shape_or_type_are_refused(copies: NDArray[np.int64]) -> None:
    with pytest.raises(TypeError):
        cpu.copy_ranges(memoryview(bytes(10)), memoryview(bytearray(10)), copies)


@native
def test_an_unknown_instruction_set_is_refused_by_name() -> None:
    done = import_cpu({"TANDEM_ISA": "mmx"})
    assert done.returncode == 1
    assert "TANDEM_ISA=mmx is unknown" in done.stderr


def test_without_a_native_module_the_reference_runs_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['kernels._native'] = None")
    done = import_cpu({"PYTHONPATH": f"{tmp_path}:{os.getcwd()}"})
    assert "reference" in done.stdout, done.stderr
    assert "not built here" in done.stdout


def test_the_other_package_called_kernels_is_refused_with_the_way_out(tmp_path: Path) -> None:
    info = tmp_path / "kernels-0.10.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.10.0\n")
    done = import_cpu({"PYTHONPATH": f"{tmp_path}:{os.getcwd()}"})
    assert done.returncode == 1
    assert "pip uninstall kernels" in done.stderr


def import_cpu(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    program = "from kernels import cpu; print(cpu.isa(), cpu.NATIVE, cpu.REASON)"
    return run_python("-c", program, environment=environment)


def run_python(*arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
