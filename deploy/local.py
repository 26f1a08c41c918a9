"""`python -m deploy.local`: a whole disaggregated cluster on this machine, with one command.

Starts a proxy and its engines, waits until a real completion has gone through every role, says where they are, and
stops everything in order at Ctrl-C or when one of them dies.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from pydantic import SecretStr, model_validator

from deploy.cluster import Cluster, Failed, Keys, Member
from deploy.logs import Logs
from deploy.ports import free_ports, is_free
from engine.api.settings import Settings, load, setting
from engine.models.resolve import ModelNotFound, resolve

WATCH_S = 0.25
EXAMPLE = """
python -m deploy.local --model smollm2 --port 8000
python -m deploy.local --decode 2 --engine-block-size 32 --proxy-routing-strategy random
"""


class LocalSettings(Settings):
    """Frozen. From flags, TANDEM_LOCAL_* and `--config`; see `engine.api.settings`."""

    env_prefix = "TANDEM_LOCAL_"

    model: str = setting(
        "smollm2", "Hugging Face directory, .gguf file, or a bundled name", group="Cluster", min_length=1
    )
    prefill: int = setting(1, "that read prompts", group="Cluster", ge=0, unit="engines")
    decode: int = setting(1, "that write answers", group="Cluster", ge=0, unit="engines")
    hybrid: int = setting(0, "that do both", group="Cluster", ge=0, unit="engines")
    pin: bool = setting(True, "give every engine cores of its own, where there is one for each", group="Cluster")

    host: str = setting("127.0.0.1", "address of the proxy", group="Network", unit="address")
    port: int = setting(8000, "port of the proxy", group="Network", ge=1, le=65535)
    api_key: tuple[SecretStr, ...] = setting((), "one of these opens /v1; none: it is open", group="Network")
    cluster_key: SecretStr | None = setting(
        None,
        "opens /nodes and /distserve; unset: they are open [env TANDEM_CLUSTER_KEY]",
        group="Network",
        env="TANDEM_CLUSTER_KEY",
    )

    log_dir: Path | None = setting(
        None, "a log file for each process in this directory, instead of the terminal", group="Life"
    )
    startup_timeout: float = setting(300.0, "longest wait for the first answer", group="Life", gt=0, unit="seconds")
    stop_timeout: float = setting(10.0, "for requests under way at Ctrl-C", group="Life", ge=0, unit="seconds")

    @model_validator(mode="after")
    def _can_answer(self) -> LocalSettings:
        if bool(self.prefill) != bool(self.decode):
            raise ValueError("--prefill and --decode need each other: at least one of each, or none")
        if not self.prefill and not self.hybrid:
            raise ValueError("no engine: give --prefill and --decode, or --hybrid")
        return self

    @property
    def roles(self) -> list[str]:
        return ["prefill"] * self.prefill + ["decode"] * self.decode + ["hybrid"] * self.hybrid


def main(argv: Sequence[str] | None = None) -> None:
    own, for_engines, for_proxy = split_flags(sys.argv[1:] if argv is None else argv)
    settings = load(
        LocalSettings,
        own,
        prog="deploy.local",
        description="A disaggregated cluster on this machine. --engine-X and --proxy-X are handed on as --X.",
        example=EXAMPLE,
    )
    try:
        _check(settings)
        with ExitStack() as stack:
            logs = stack.enter_context(Logs(settings.log_dir))
            members = plan(settings, for_engines, for_proxy)
            _run(Cluster(members, settings.model, _keys(settings), logs.hear, _say), settings)
    except Failed as error:
        print(f"deploy.local: error: {error}", file=sys.stderr)
        sys.exit(1)


def split_flags(argv: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """(ours, every engine's, the proxy's): a flag takes along the words up to the next flag."""
    parts: dict[str, list[str]] = {"": [], "engine": [], "proxy": []}
    part = ""
    for word in argv:
        if word.startswith("--"):
            head, _, tail = word[2:].partition("-")
            part = head if head in ("engine", "proxy") and tail else ""
        parts[part].append(word.replace(f"--{part}-", "--", 1) if part else word)
    return parts[""], parts["engine"], parts["proxy"]


def plan(settings: LocalSettings, for_engines: Sequence[str], for_proxy: Sequence[str]) -> list[Member]:
    """The members of the cluster, the proxy first. What the user handed on comes last, and so wins."""
    flags = ("--host", settings.host, "--port", str(settings.port), *_drain(settings), *for_proxy)
    proxy = Member("proxy", "proxy", _reachable(settings.host, settings.port), flags)
    cores = share_cores(sorted(os.sched_getaffinity(0)), len(settings.roles)) if settings.pin else None
    members = [proxy]
    for index, (role, port) in enumerate(zip(settings.roles, free_ports(len(settings.roles)), strict=True)):
        number = settings.roles[: index + 1].count(role)
        own = cores[index] if cores else ()
        members.append(_engine(settings, f"{role}-{number}", role, port, own, proxy.url, for_engines))
    return members


def _engine(
    settings: LocalSettings,
    name: str,
    role: str,
    port: int,
    cores: tuple[int, ...],
    proxy_url: str,
    extra: Sequence[str],
) -> Member:
    flags = ["--model", settings.model, "--role", role, "--port", str(port), "--proxy-url", proxy_url]
    flags += [*_drain(settings), "--num-threads", str(max(1, len(cores)))]
    return Member(name, role, f"http://127.0.0.1:{port}", (*flags, *extra), cores)


def _drain(settings: LocalSettings) -> tuple[str, str]:
    return "--drain-timeout", str(settings.stop_timeout / 2)


def share_cores(cores: Sequence[int], engines: int) -> list[tuple[int, ...]] | None:
    """The same number of cores for each engine; None when there is not one for each."""
    each = len(cores) // engines
    return [tuple(cores[i * each : (i + 1) * each]) for i in range(engines)] if each else None


def _check(settings: LocalSettings) -> None:
    """What would otherwise be found out by every child for itself."""
    try:
        resolve(settings.model)
        free = is_free(settings.port, settings.host)
    except ModelNotFound as error:
        raise Failed(f"--model: {error}") from None
    except OSError as error:
        raise Failed(f"--host {settings.host}: {error.strerror or error}") from None
    if not free:
        raise Failed(
            f"port {settings.port} on {settings.host} is in use or not ours to take; choose another with --port"
        )


def _keys(settings: LocalSettings) -> Keys:
    api = tuple(key.get_secret_value() for key in settings.api_key)
    return Keys(api, settings.cluster_key.get_secret_value() if settings.cluster_key else None)


def _reachable(host: str, port: int) -> str:
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _run(cluster: Cluster, settings: LocalSettings) -> None:
    """Until Ctrl-C. Raises Failed when the cluster does not start, or when one of its processes ends."""
    signals = _Signals(cluster)
    try:
        cluster.start()
        cluster.wait_ready(settings.startup_timeout)
        _say(_banner(cluster))
        while True:
            cluster.check_alive()
            time.sleep(WATCH_S)
    except KeyboardInterrupt:
        _say("stopping; once more to stop at once")
    finally:
        signals.stopping = True
        killed = cluster.stop(settings.stop_timeout)
        _say(f"stopped, {', '.join(killed)} by force" if killed else "stopped")


class _Signals:
    """SIGTERM and SIGINT: the first leaves what runs with KeyboardInterrupt, a later one ends everything at once."""

    def __init__(self, cluster: Cluster) -> None:
        self.stopping = False
        self._cluster = cluster
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.stopping:
            self._cluster.kill()
            os._exit(128 + number)
        self.stopping = True
        raise KeyboardInterrupt


def _banner(cluster: Cluster) -> str:
    url, key = cluster.proxy_url, " -H 'Authorization: Bearer <your key>'" if cluster.keys.api else ""
    body = f'{{"model": "{cluster.model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    return f"""
Tandem serves {cluster.model} at {url}/v1

  curl {url}/v1/chat/completions{key} \\
    -H 'Content-Type: application/json' -d '{body}'

  dashboard  {url}/
  API docs   {url}/docs
  metrics    {url}/metrics

Ctrl-C stops everything.
"""


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
