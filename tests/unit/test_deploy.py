"""The local launcher's parts: flags shared out, cores shared out, children that do not outlive it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from deploy.child import Child, stop
from deploy.local import LocalSettings, plan, share_cores, split_flags
from deploy.logs import Logs
from deploy.ports import free_ports, is_free
from deploy.probe import totals
from engine.api.settings import SettingsError, read

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
POLITE = "import time; print('up', flush=True); time.sleep(60)"
DEADLINE_S = 20.0


class Heard:
    """Lines that children wrote; lets a test wait for one."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self._changed = threading.Condition()

    def hear(self, name: str, line: str) -> None:
        with self._changed:
            self.lines.append((name, line))
            self._changed.notify_all()

    def wait_for(self, line: tuple[str, str]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: line in self.lines, timeout=DEADLINE_S)


def child(program: str, heard: Heard, name: str = "child", cores: tuple[int, ...] = ()) -> Child:
    return Child(name, [sys.executable, "-c", program], dict(os.environ), cores, heard.hear)


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"  # dead, its parent has yet to look


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not is_gone(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.02)


def test_flags_go_where_they_belong() -> None:
    argv = [
        "--port",
        "1",
        "--engine-block-size",
        "32",
        "--proxy-routing-strategy=random",
        "--engine-no-x",
        "--decode",
        "2",
    ]
    assert split_flags(argv) == (
        ["--port", "1", "--decode", "2"],
        ["--block-size", "32", "--no-x"],
        ["--routing-strategy=random"],
    )


@pytest.mark.parametrize(
    ("cores", "engines", "shares"),
    [([0, 1], 2, [(0,), (1,)]), ([0, 1, 2, 3, 4], 2, [(0, 1), (2, 3)]), ([0], 2, None), ([3], 1, [(3,)])],
)
def test_cores_are_shared_out_evenly(cores: list[int], engines: int, shares: list[tuple[int, ...]] | None) -> None:
    assert share_cores(cores, engines) == shares


def test_the_plan_names_every_process_and_lets_the_users_flags_win() -> None:
    settings = read(LocalSettings, ["--decode", "2", "--port", "8123"], "deploy.local", "")
    members = plan(settings, ["--block-size", "32"], ["--log-level", "debug"])
    assert [member.name for member in members] == ["proxy", "prefill-1", "decode-1", "decode-2"]
    assert members[0].url == "http://127.0.0.1:8123"
    assert members[0].flags[-2:] == ("--log-level", "debug")
    assert all(member.flags[-2:] == ("--block-size", "32") for member in members[1:])
    assert len({member.url for member in members}) == 4


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:8123"),
        ("10.0.0.5", "http://10.0.0.5:8123"),
        ("::", "http://[::1]:8123"),  # listened on without 127.0.0.1
        ("::1", "http://[::1]:8123"),
    ],
)
def test_engines_are_given_an_address_of_the_proxy_that_works(host: str, url: str) -> None:
    proxy, *engines = plan(read(LocalSettings, ["--host", host, "--port", "8123"], "deploy.local", ""), [], [])
    assert proxy.url == url
    assert all(engine.flags[engine.flags.index("--proxy-url") + 1] == url for engine in engines)


@pytest.mark.parametrize("argv", [["--prefill", "0"], ["--prefill", "0", "--decode", "0"]])
def test_a_cluster_that_cannot_answer_is_refused(argv: list[str]) -> None:
    with pytest.raises(SettingsError):
        read(LocalSettings, argv, "deploy.local", "")


def test_free_ports_are_free_and_distinct() -> None:
    ports = free_ports(5)
    assert len(set(ports)) == 5
    assert all(is_free(port, "127.0.0.1") for port in ports)


def test_a_childs_lines_are_heard_under_its_name() -> None:
    heard = Heard()
    process = child("import sys; print('out'); print('err', file=sys.stderr)", heard, "prefill-1")
    assert process.join(time.monotonic() + DEADLINE_S)
    process.finish()
    assert sorted(heard.lines) == [("prefill-1", "err"), ("prefill-1", "out")]
    assert process.exit_code == 0


def test_a_child_keeps_to_its_cores() -> None:
    core, heard = min(os.sched_getaffinity(0)), Heard()
    process = child("import os; print(os.sched_getaffinity(0))", heard, cores=(core,))
    heard.wait_for(("child", f"{{{core}}}"))
    process.finish()


def test_a_stubborn_child_is_killed_and_named_and_a_stopped_one_still_ends() -> None:
    heard = Heard()
    children = [child(STUBBORN, heard, "stubborn"), child(POLITE, heard, "polite"), child(POLITE, heard, "stopped")]
    for process in children:
        heard.wait_for((process.name, "up"))
    children[2].signal(signal.SIGSTOP)
    assert stop(children, grace_s=1.0) == ["stubborn"]
    assert all(process.exit_code is not None for process in children)


def test_a_childs_own_children_end_with_it() -> None:
    heard = Heard()
    process = child(f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {POLITE!r}]).pid)", heard)
    process.join(time.monotonic() + DEADLINE_S)
    heard.wait_for(("child", "up"))
    grandchild = next(int(line) for _, line in heard.lines if line.isdigit())
    process.finish()
    wait_until_gone(grandchild)


def test_children_end_when_their_launcher_is_killed() -> None:
    heard = Heard()
    launcher = child(
        "import os, sys, time\nfrom deploy.child import Child\n"
        f"print(Child('inner', [sys.executable, '-c', {POLITE!r}], dict(os.environ), (), print).pid, flush=True)\n"
        "time.sleep(60)",
        heard,
    )
    heard.wait_for(("child", "inner up"))
    launcher.signal(signal.SIGKILL)
    wait_until_gone(next(int(line) for _, line in heard.lines if line.isdigit()))
    launcher.finish()


def test_log_lines_go_to_a_file_for_each_process(tmp_path: Path) -> None:
    with Logs(tmp_path / "logs") as logs:
        logs.hear("proxy", "one")
        logs.hear("decode-1", "two")
        logs.hear("proxy", "three")
    assert (tmp_path / "logs" / "proxy.log").read_text() == "one\nthree\n"
    assert (tmp_path / "logs" / "decode-1.log").read_text() == "two\n"


def test_metrics_are_summed_over_their_labels() -> None:
    text = '# HELP a b\na{x="1"} 2\na{x="a b"} 3.5\nb 1e3\n'
    assert totals(text.splitlines()) == {"a": 5.5, "b": 1000.0}
