"""The core's process from its parent's side: begun before it is told anything, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.child import CoreChild

DEADLINE_S = 30.0
PARENT = """
import sys, time
from engine.child import CoreChild
with CoreChild() as core:
    print(core._process.pid, flush=True)
    time.sleep(60)
"""


def test_a_core_ends_with_its_scope() -> None:
    with CoreChild() as core:
        assert core.exit_code is None
    assert core.exit_code == -signal.SIGKILL


async def test_a_core_that_is_told_nothing_ends_by_itself() -> None:
    with CoreChild() as core:
        core.tell(b"")
        assert await core.ended() == 1


async def test_everybody_who_waits_for_a_core_hears_of_its_end() -> None:
    with CoreChild() as core:
        core.end()
        assert await core.ended() == await core.ended() == -signal.SIGTERM
        core.end()  # once more, without effect


def test_a_core_that_knows_nothing_yet_dies_with_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        core = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + DEADLINE_S
    while _runs(core):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    """A zombie that its new parent has not yet looked at has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("flags", [["--help"], ["--port", "nonsense"], ["--model", "/nowhere"]])
def test_whoever_does_not_start_leaves_no_core(flags: list[str]) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "engine", *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as engine:
        _, said = engine.communicate(timeout=DEADLINE_S)
    assert "Traceback" not in said
    with pytest.raises(ProcessLookupError):
        os.killpg(engine.pid, 0)
