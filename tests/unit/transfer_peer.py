"""Both ends of a transfer for the tests: another process that owns a pool of known bytes, and a reader here."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, TypeVar, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvtransfer.copies import CopyRanges, copy_ranges
from kvtransfer.memory import Region
from kvtransfer.offer import TransportOffer
from kvtransfer.transfer import Connected, Connection, Endpoint, Event, open_endpoint

E = TypeVar("E", bound=Event)

HOST = "127.0.0.1"
ROOT = Path(__file__).parents[2]


def pattern(num_bytes: int) -> NDArray[np.uint8]:
    """What the owner's pool holds."""
    return np.random.default_rng(7).integers(0, 256, num_bytes, np.uint8)


class Peer:
    """Runs this module as a process that owns `num_bytes` and admits "reader" by `secret`."""

    def __init__(self, transport: str, num_bytes: int, secret: bytes) -> None:
        command = [sys.executable, "-m", "tests.unit.transfer_peer", transport, str(num_bytes), secret.hex()]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
        line = cast(IO[bytes], self.process.stdout).readline()
        self.offer = msgspec.json.decode(line, type=TransportOffer)

    def kill(self) -> None:
        """kill -9. Idempotent; wakes it first when it was stopped."""
        self.process.kill()
        self.process.communicate()

    def stop(self) -> None:
        """Returns when all its threads stand still."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)


class Reader:
    """A pool of this process and the endpoint over it."""

    def __init__(self, transport: str, num_bytes: int, copy: CopyRanges = copy_ranges) -> None:
        self.region = Region.allocate(num_bytes)
        self.pool = np.frombuffer(self.region.buffer, np.uint8)
        self.endpoint: Endpoint = open_endpoint(transport, self.region, HOST, copy)
        self.events: list[Event] = []

    def start(self, offer: TransportOffer, secret: bytes, deadline_s: float = 10.0) -> Connection:
        return self.endpoint.connect("owner", offer, "reader", secret, deadline_s)

    def connect(self, offer: TransportOffer, secret: bytes) -> Connection:
        self.start(offer, secret)
        return self.wait(Connected).connection

    def next(self, timeout_s: float = 10.0) -> Event:
        """The next event. Fails at the timeout."""
        deadline = time.monotonic() + timeout_s
        while not self.events:
            assert select.select([self.endpoint.fileno()], [], [], max(0, deadline - time.monotonic()))[0], "no event"
            self.events += self.endpoint.poll()
        return self.events.pop(0)

    def wait(self, kind: type[E], timeout_s: float = 10.0) -> E:
        """The next event, which must be of this kind."""
        event = self.next(timeout_s)
        assert isinstance(event, kind), event
        return event

    def close(self) -> None:
        self.endpoint.close()
        del self.pool
        self.region.close()


def main(transport: str, num_bytes: str, secret: str) -> None:
    region = Region.allocate(int(num_bytes))
    np.frombuffer(region.buffer, np.uint8)[:] = pattern(int(num_bytes))
    endpoint = open_endpoint(transport, region, HOST)
    endpoint.admit("reader", bytes.fromhex(secret))
    os.write(1, msgspec.json.encode(endpoint.offer()) + b"\n")
    os.read(0, 1)
    endpoint.close()
    region.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
