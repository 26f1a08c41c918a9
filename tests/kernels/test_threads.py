"""Kernels do not depend on which threads come, or when: those without a core of their own come late, or not at all."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from kernels import cpu

if not cpu.NATIVE:
    pytest.skip(cpu.REASON, allow_module_level=True)

from kernels import threads
from kernels.weight import multiply, pack_weight

JOBS = 400


@pytest.fixture(params=[1, 2, 7])
def several_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    threads.set_threads(request.param)
    yield request.param
    threads.set_threads(2)


def test_products_are_whole_however_many_threads_share_a_core(several_threads: int) -> None:
    random = np.random.default_rng(several_threads)
    weight = pack_weight(random.standard_normal((700, 64), np.float32), "float32")
    rows = random.standard_normal((JOBS, 64), np.float32)
    threads.set_threads(1)
    expected = [multiply(rows[:count], weight) for count in (1, 5, 40)]
    threads.set_threads(several_threads)
    for job in range(JOBS):
        assert_array_equal(multiply(rows[: (1, 5, 40)[job % 3]], weight), expected[job % 3])


def test_threads_may_be_replaced_between_jobs() -> None:
    weight = pack_weight(np.ones((64, 32), np.float32), "float32")
    for count in (1, 3, 2, 6, 1, 2):
        threads.set_threads(count)
        assert_array_equal(multiply(np.ones((2, 32), np.float32), weight), np.full((2, 64), 32, np.float32))
