"""How fast KV moves between two processes, and what it costs, against plain copies made in the same run.

    python -m tests.bench.transfer --help

One process owns a pool, another pulls 2,000 tokens' blocks out of it by each transport. Beside that, in the reader's
process alone: the same ranges by memmove and by streaming stores; and the same bytes over a plain socket, with
`sendall` and `recv_into`. Every round does all of them, each on other blocks, so that noise hits all alike and nothing
is found in a cache. GB/s are medians; CPU-seconds per GB are from getrusage, over all rounds.
"""

from __future__ import annotations

import argparse
import resource
import select
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

import msgspec
import numpy as np

from kernels import cpu
from kvtransfer.copies import Copies, copy_ranges
from kvtransfer.layout import KVLayout
from kvtransfer.memory import Region
from kvtransfer.offer import TransportOffer
from kvtransfer.plan import plan
from kvtransfer.transfer import TRANSPORTS, Connected, Connection, Endpoint, Event, Pulled, open_endpoint

HOST = "127.0.0.1"
SECRET = bytes(32)
DEADLINE_S = 30.0
PAGES_S = 60.0  # for a pool's pages to be there, so that no first touch is measured
SOCKET_BYTES = 1 << 20  # one call of the plain socket's reader


@dataclass
class Row:
    """One way to copy. `seconds` has one entry a round."""

    way: str
    num_bytes: int
    seconds: list[float] = field(default_factory=list)
    reader_cpu_s: float = 0.0
    owner_cpu_s: float = 0.0

    def figures(self) -> dict[str, float | str]:
        gigabytes = self.num_bytes / 1e9
        total = gigabytes * len(self.seconds)
        return {
            "way": self.way,
            "gigabytes_per_s": gigabytes / statistics.median(self.seconds),
            "best_gigabytes_per_s": gigabytes / min(self.seconds),
            "reader_cpu_s_per_gigabyte": self.reader_cpu_s / total,
            "owner_cpu_s_per_gigabyte": self.owner_cpu_s / total,
        }


def main() -> None:
    arguments = parse()
    print(f"{arguments.tokens} tokens, {arguments.rounds} rounds, {cpu.REASON}")
    results = {size: Bench(layout_of(size, arguments), arguments).run() for size in arguments.block_sizes}
    if arguments.json:
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(results)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2000, help="tokens pulled at once (default 2000)")
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[16, 32, 64], help="tokens a block")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--heads", type=int, default=3, help="KV heads")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--pool-mib", type=int, default=384, help="size of each of the two pools")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write all figures here")
    return parser.parse_args()


def layout_of(block_size: int, arguments: argparse.Namespace) -> KVLayout:
    one = KVLayout(
        num_blocks=1,
        block_size=block_size,
        num_layers=arguments.layers,
        num_kv_heads=arguments.heads,
        head_dim=arguments.head_dim,
        dtype="bfloat16",
    )
    return msgspec.structs.replace(one, num_blocks=(arguments.pool_mib << 20) // one.block_bytes)


class Bench:
    """The reader's process; the owner is started and stopped by `run`."""

    def __init__(self, layout: KVLayout, arguments: argparse.Namespace) -> None:
        self.layout = layout
        self.tokens: int = arguments.tokens
        self.rounds: int = arguments.rounds
        self.random = np.random.default_rng(1)
        self.region = Region.allocate(layout.pool_bytes)
        self.source = Region.allocate(layout.pool_bytes)
        for region in (self.region, self.source):
            assert region.presence.wait(PAGES_S)
        self.num_bytes = int(self.copies()[:, 2].sum())

    def run(self) -> list[dict[str, float | str]]:
        ours, theirs = get_context("spawn").Pipe()
        owner = get_context("spawn").Process(target=own, args=(theirs, self.layout.pool_bytes), daemon=True)
        owner.start()
        try:
            offers = [msgspec.json.decode(offer, type=TransportOffer) for offer in ours.recv()]
            rows = self._measure(ours, offers)
        finally:
            ours.send("stop")
            owner.join()
        return show(self.layout, rows)

    def copies(self) -> Copies:
        """A sequence in random blocks of both pools: no two of them adjacent by design."""
        source, destination = (self.random.permutation(self.layout.num_blocks).tolist() for _ in range(2))
        return plan(self.layout, self.layout, source, destination, 0, self.tokens)

    def _measure(self, owner: Pipe, offers: list[TransportOffer]) -> list[Row]:
        endpoints = {
            offer.transport: open_endpoint(offer.transport, self.region, HOST, cpu.copy_ranges) for offer in offers
        }
        ways: dict[str, Callable[[], float]] = {
            "memcpy": lambda: self._copy(copy_ranges),
            "streaming": lambda: self._copy(cpu.copy_ranges),
            "plain socket": lambda: self._socket(owner),
        }
        for offer in offers:
            endpoint = endpoints[offer.transport]
            connection = connect(endpoint, offer)
            ways[offer.transport] = lambda e=endpoint, c=connection: self._pull(e, c)  # type: ignore[misc]
        rows = [Row(way, self.num_bytes) for way in ways]
        for _ in range(self.rounds):
            for row in rows:
                charge(row, owner, ways[row.way])
        for endpoint in endpoints.values():
            endpoint.close()
        return rows

    def _copy(self, copy: Callable[[memoryview, memoryview, Copies], None]) -> float:
        copies = self.copies()
        started = time.perf_counter()
        copy(self.source.buffer, self.region.buffer, copies)
        return time.perf_counter() - started

    def _pull(self, endpoint: Endpoint, connection: Connection) -> float:
        copies = self.copies()
        started = time.perf_counter()
        connection.pull(1, copies, DEADLINE_S)
        event = wait(endpoint)
        assert isinstance(event, Pulled), event
        return time.perf_counter() - started

    def _socket(self, owner: Pipe) -> float:
        """The connection is made beforehand; the clock runs from the first byte asked for to the last received."""
        with socket.create_server((HOST, 0)) as server:
            from_, to = self.random.integers(0, len(self.region.buffer) - self.num_bytes, 2).tolist()
            owner.send(("send", server.getsockname()[1], from_, self.num_bytes))
            sock, _ = server.accept()
        view = self.region.buffer[to : to + self.num_bytes]
        with sock:
            sock.recv(1)
            sock.sendall(b"g")
            started = time.perf_counter()
            while view:
                view = view[sock.recv_into(view[:SOCKET_BYTES]) :]
            return time.perf_counter() - started


def charge(row: Row, owner: Pipe, way: Callable[[], float]) -> None:
    """One round of one way, with the CPU time that both processes spent on it."""
    owner_before, reader_before = ask_cpu(owner), own_cpu()
    row.seconds.append(way())
    row.reader_cpu_s += own_cpu() - reader_before
    row.owner_cpu_s += ask_cpu(owner) - owner_before


def connect(endpoint: Endpoint, offer: TransportOffer) -> Connection:
    endpoint.connect("owner", offer, "reader", SECRET, DEADLINE_S)
    event = wait(endpoint)
    assert isinstance(event, Connected), event
    return event.connection


def wait(endpoint: Endpoint) -> Event:
    while not (events := endpoint.poll()):
        select.select([endpoint.fileno()], [], [], DEADLINE_S)
    (event,) = events
    return event


def own_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def ask_cpu(owner: Pipe) -> float:
    owner.send("cpu")
    seconds: float = owner.recv()
    return seconds


def own(pipe: Pipe, pool_bytes: int) -> None:
    """The owner's process: serves until it is told to stop."""
    region = Region.allocate(pool_bytes)
    assert region.presence.wait(PAGES_S)
    endpoints = [open_endpoint(transport, region, HOST) for transport in TRANSPORTS]
    for endpoint in endpoints:
        endpoint.admit("reader", SECRET)
    pipe.send([msgspec.json.encode(endpoint.offer()) for endpoint in endpoints])
    while (command := pipe.recv()) != "stop":
        if command == "cpu":
            pipe.send(own_cpu())
        else:
            send_plainly(region, *command[1:])
    for endpoint in endpoints:
        endpoint.close()


def send_plainly(region: Region, port: int, offset: int, num_bytes: int) -> None:
    with socket.create_connection((HOST, port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(b"r")
        sock.recv(1)
        sock.sendall(region.buffer[offset : offset + num_bytes])


def show(layout: KVLayout, rows: list[Row]) -> list[dict[str, float | str]]:
    figures = [row.figures() for row in rows]
    print(
        f"\nblocks of {layout.block_size} tokens, {layout.block_bytes:,} bytes; {rows[0].num_bytes / 1e6:.1f} MB a pull"
    )
    print(f"{'':14}{'GB/s':>8}{'best':>8}{'reader CPU-s/GB':>18}{'owner CPU-s/GB':>18}")
    for row in figures:
        way, speed, best, reader, owner = row.values()
        print(f"{way:14}{speed:8.2f}{best:8.2f}{reader:18.3f}{owner:18.3f}")
    return figures


if __name__ == "__main__":
    main()
