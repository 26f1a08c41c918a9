"""Our own set-ups, as recipes like the peers': which engines, with which roles, on which cores."""

from __future__ import annotations

from collections.abc import Sequence

from deploy import probe
from deploy.cluster import ROOT, TRANSFERRED_TOKENS, Member
from deploy.ports import free_ports
from tests.bench.peers import Launch, Places, Process, check_counted


def hybrid(places: Places, cores: Sequence[int], flags: Sequence[str]) -> Launch:
    """One engine on every core, asked directly: nothing of ours stands in front of it, as nothing does of the peers."""
    (port,) = free_ports(1)
    engine = _engine(places, "hybrid", "hybrid", port, cores, flags)
    return Launch((_process(engine),), (engine.url,), places.model, may_stop=False)


def pair(places: Places, cores: Sequence[int], flags: Sequence[str]) -> Launch:
    """A prefill and a decode engine on a core each, behind the proxy."""
    return _behind_proxy(places, ("prefill", "decode"), cores, flags)


def two_hybrids(places: Places, cores: Sequence[int], flags: Sequence[str]) -> Launch:
    """Two engines that do both, on a core each, behind the proxy."""
    return _behind_proxy(places, ("hybrid", "hybrid"), cores, flags)


RECIPES = {"hybrid": hybrid, "pair": pair, "two-hybrids": two_hybrids}


def _behind_proxy(places: Places, roles: Sequence[str], cores: Sequence[int], flags: Sequence[str]) -> Launch:
    """`cores` of a machine with only one are shared."""
    proxy_port, *ports = free_ports(1 + len(roles))
    proxy = Member("proxy", "proxy", f"http://127.0.0.1:{proxy_port}", ("--port", str(proxy_port)))
    engines = [
        _engine(places, f"{role}-{index}", role, port, (cores[index % len(cores)],), ("--proxy-url", proxy.url, *flags))
        for index, (role, port) in enumerate(zip(roles, ports, strict=True))
    ]
    decoding = [engine.url for engine in engines if engine.role == "decode"]

    def confirm() -> None:
        for url in decoding:
            check_counted(url, TRANSFERRED_TOKENS)

    return Launch(
        tuple(_process(member) for member in (proxy, *engines)),
        (proxy.url,),
        places.model,
        complete=lambda: _registered(proxy.url) >= {engine.url for engine in engines},
        confirm=confirm,
        may_stop=False,
    )


def _engine(places: Places, name: str, role: str, port: int, cores: Sequence[int], flags: Sequence[str]) -> Member:
    own = ("--role", role, "--port", str(port), "--model", places.model, "--num-threads", str(len(cores)))
    return Member(name, role, f"http://127.0.0.1:{port}", (*own, *flags), tuple(cores))


def _process(member: Member) -> Process:
    return Process(member.name, tuple(member.command), {"PYTHONPATH": str(ROOT)}, member.cores)


def _registered(proxy_url: str) -> set[str]:
    try:
        return set(probe.nodes(proxy_url, None))
    except probe.NotReady:
        return set()
