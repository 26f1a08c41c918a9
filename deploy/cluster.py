"""The processes of one cluster on one machine: started together, watched, stopped in order."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deploy import probe
from deploy.child import Child, Listener, stop

ROOT = Path(__file__).resolve().parent.parent
POLL_S = 0.05
TRIES = 3  # completions until one has gone through both roles
COUNTING_S = 3.0  # for an engine's counters to show a completion; they are about a second old

PROMPT_TOKENS = "tandem_engine_prompt_tokens_total"
TRANSFERRED_TOKENS = "tandem_engine_transferred_tokens_total"
LOCAL_TOKENS = "tandem_engine_local_tokens_total"  # where a user lets decode compute prompts as long as ours


class Failed(Exception):
    """The cluster cannot start or has stopped working; the message is for the user."""


@dataclass(frozen=True, slots=True)
class Member:
    """One process of the cluster, not yet started. `role` is proxy, prefill, decode or hybrid."""

    name: str
    role: str
    url: str
    flags: tuple[str, ...]
    cores: tuple[int, ...] = ()

    @property
    def command(self) -> list[str]:
        program = "proxy" if self.role == "proxy" else "engine"
        return [sys.executable, "-P", "-u", "-m", program, *self.flags]  # -P: never a `proxy/` of the current directory


@dataclass(frozen=True, slots=True)
class Keys:
    """What opens this cluster. Handed to the processes by environment, where `ps` does not show it."""

    api: tuple[str, ...] = ()
    cluster: str | None = None

    @property
    def user(self) -> str | None:
        return self.api[0] if self.api else None

    def environment(self) -> dict[str, str]:
        listed = ",".join(self.api)
        env = {"TANDEM_PROXY_API_KEY": listed, "TANDEM_ENGINE_API_KEY": listed} if listed else {}
        return env | ({"TANDEM_CLUSTER_KEY": self.cluster} if self.cluster else {})


@dataclass(slots=True)
class Cluster:
    """`start`, then `wait_ready`, then whatever you like, and `stop` in any case."""

    members: Sequence[Member]  # the proxy first
    model: str  # the name it is served under
    keys: Keys
    listener: Listener  # hears every line the processes write
    say: Callable[[str], None]  # progress, for the user
    environment: dict[str, str] = field(default_factory=dict)  # on top of the launcher's own
    children: dict[str, Child] = field(default_factory=dict)
    started: float = 0.0  # time.monotonic() seconds

    @property
    def proxy_url(self) -> str:
        return self.members[0].url

    @property
    def engines(self) -> list[Member]:
        return [member for member in self.members if member.role != "proxy"]

    def start(self) -> None:
        self.started = time.monotonic()
        for member in self.members:
            self.start_member(member)

    def start_member(self, member: Member) -> None:
        """Also again, after it has ended."""
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": path, **self.keys.environment(), **self.environment}
        self.children[member.name] = Child(member.name, member.command, env, member.cores, self.listener)

    def stop(self, grace_s: float) -> list[str]:
        """Engines first, so that they can leave the proxy; the names of those that had to be killed."""
        children = dict(self.children)
        proxy = [child for name, child in children.items() if name == "proxy"]
        others = [child for name, child in children.items() if name != "proxy"]
        try:
            return stop(others, grace_s) + stop(proxy, grace_s)
        finally:
            self.kill()

    def kill(self) -> None:
        """At once, and with everything that they have started."""
        for child in self.children.values():
            child.finish()

    def check_alive(self) -> None:
        """Raises Failed when a process has ended, with the last that it said."""
        for child in self.children.values():
            if child.exit_code is not None:
                child.finish()  # its last lines may still be on their way
                last = "\n".join(f"    {line}" for line in list(child.tail)[-10:])
                raise Failed(f"{child.name} ended with exit code {child.exit_code}; its last lines:\n{last}")

    def wait_ready(self, timeout_s: float) -> None:
        """Until every engine is registered and a completion has gone through each role. Raises Failed."""
        deadline = time.monotonic() + timeout_s
        self._wait_registered(deadline)
        self._wait_served(deadline)

    def _wait_registered(self, deadline: float) -> None:
        missing = {member.url: member.name for member in self.engines}
        listening = False
        while missing or not listening:
            self._tick(deadline, f"still starting: {', '.join(missing.values()) or 'proxy'}")
            try:
                known = probe.nodes(self.proxy_url, self.keys.cluster)
            except probe.NotReady:
                continue
            if not listening:
                self._report("proxy listens")
            listening = True
            for url in missing.keys() & known.keys():
                self._report(f"{missing.pop(url)} registered")

    def _wait_served(self, deadline: float) -> None:
        """A decode engine that quietly computes prompts itself must not pass for a working cluster."""
        for _ in range(TRIES):
            self._tick(deadline, "no completion yet")
            try:
                text = probe.complete(self.proxy_url, self.model, self.keys.user, deadline - time.monotonic())
                idle = self._idle_roles(time.monotonic() + COUNTING_S)
            except probe.NotReady as error:
                self.check_alive()
                raise Failed(f"the first completion failed: {error}") from None
            if not idle:
                self._report(f"a completion went through every role: {text!r}")
                return
        raise Failed(f"completions succeed, but these took no part in them: {', '.join(idle)}")

    def _idle_roles(self, deadline: float) -> list[str]:
        """Roles of which no engine has done its work by the deadline: to read a prompt, or to take over its KV. Hybrid
        engines beside a pair of the others work only when that is down."""
        idle = {member.role for member in self.engines}
        idle -= {"hybrid"} if "prefill" in idle else set()
        while True:
            idle -= {member.role for member in self.engines if _has_worked(member)}
            if not idle or time.monotonic() > deadline:
                return sorted(idle)
            time.sleep(POLL_S)

    def _tick(self, deadline: float, state: str) -> None:
        self.check_alive()
        if time.monotonic() > deadline:
            raise Failed(f"not ready after {time.monotonic() - self.started:.0f} s ({state})")
        time.sleep(POLL_S)

    def _report(self, what: str) -> None:
        self.say(f"{time.monotonic() - self.started:5.1f} s  {what}")


def _has_worked(member: Member) -> bool:
    signs = (TRANSFERRED_TOKENS, LOCAL_TOKENS) if member.role == "decode" else (PROMPT_TOKENS,)
    counters = probe.counters(member.url)
    return any(counters.get(sign, 0) > 0 for sign in signs)
