"""The core's one loop lives on, whatever comes over the control channel."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest
import zmq

from engine.assembly import Assembly
from engine.messages import Call, Connect, FromCore, Initialize, LinkCommand, Reply
from engine.messages import Ready as CoreReady
from engine.migrate.links import LinkPolicy, Links
from engine.process import CoreProcess, dial_api
from kvtransfer.memory import Region
from kvtransfer.protocol import EndpointInfo, Fail, Key, Release, Want
from tests.unit.fake_core import LAYOUT, MODEL
from tests.unit.toy_engines import PREFILL, Pair

ME, PEER = "http://127.0.0.1:1", "http://127.0.0.1:2"
DEADLINE_MS = 5000

Message = TypeVar("Message", CoreReady, Reply)

encode = msgspec.msgpack.encode
BROKEN = [
    b"",
    b"\xc1",
    encode("words"),
    encode([9, [1, 2]]),
    encode([5, [1]]),
    encode(Fail(Key(1, 2), "abc")).replace(b"abc", b"\xff\xfe\xfd"),  # a string that is not UTF-8
    encode(Want(Key(1, 2), "abc", True)).replace(b"abc", b"\xff\xfe\xfd"),
    b"\x93" + encode(Release(Key(1, 2)))[1:] + b"\x91" * 100_000 + b"\x01",  # nested without end
]


class Core:
    """A core process's loop in a thread, over an engine without a model, and the API process's end of its socket."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.context = context
        self.api, inner = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        self.api.bind("inproc://core")
        inner.connect("inproc://core")
        self.api.setsockopt(zmq.RCVTIMEO, DEADLINE_MS)
        policy = LinkPolicy(cluster_key=b"", transports=(), require_transport=None, reads=True)
        links = Links(context, "127.0.0.1", PREFILL + "-1", MODEL, LAYOUT, {}, policy)
        self.engine = Pair().prefill.engine
        self.engine.giving._send = links.send_to_reader
        parts = Assembly(MODEL, self.engine, links, {}, Region.allocate(4096))
        self.process = CoreProcess(parts, inner, "one")
        self._closes = (links.close, parts.region.close, inner.close, self.api.close)
        self._thread = threading.Thread(target=self.process.run)
        self._thread.start()
        ready = self.hear(CoreReady)
        self.control_address = ready.control_address

    def hear(self, kind: type[Message]) -> Message:
        while True:
            message = msgspec.msgpack.decode(self.api.recv(), type=FromCore)
            if isinstance(message, kind):
                return message

    def call(self, command: LinkCommand) -> Reply:
        self.api.send(encode(Call(1, command)))
        return self.hear(Reply)

    def dial(self, routing_id: bytes) -> zmq.Socket[bytes]:
        """A reader's end of the control channel."""
        socket = self.context.socket(zmq.DEALER)
        socket.setsockopt(zmq.ROUTING_ID, routing_id)
        socket.setsockopt(zmq.RCVTIMEO, DEADLINE_MS)
        socket.connect(self.control_address)
        return socket

    def close(self) -> None:
        self.process.stop()
        self._thread.join(DEADLINE_MS / 1e3)
        for close in self._closes:
            close()


@pytest.fixture
def core() -> Iterator[Core]:
    with zmq.Context() as context:
        core = Core(context)
        yield core
        core.close()


@pytest.mark.parametrize("broken", BROKEN)
def test_a_reader_that_says_nonsense(core: Core, broken: bytes) -> None:
    info = msgspec.msgpack.decode(core.call(Initialize(PEER, ME)).value, type=EndpointInfo)
    with core.dial(bytes.fromhex(info.routing_id)) as reader:
        reader.send(broken)
        reader.send(encode(Want(Key(7, 0), "another incarnation", True)))
        answer = msgspec.msgpack.decode(reader.recv(), type=Fail)
    assert answer.unknown


@pytest.mark.parametrize("broken", BROKEN)
def test_an_owner_that_says_nonsense(core: Core, broken: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: queue.Queue[object] = queue.Queue()
    monkeypatch.setattr(core.engine.taking, "told", lambda _, message: heard.put(message))
    info = msgspec.msgpack.decode(core.call(Initialize(PEER, ME)).value, type=EndpointInfo)
    with core.context.socket(zmq.ROUTER) as owner:
        owner.setsockopt(zmq.ROUTER_MANDATORY, 1)
        owner.setsockopt(zmq.SNDTIMEO, DEADLINE_MS)
        port = owner.bind_to_random_port("tcp://127.0.0.1")
        peer = msgspec.structs.replace(info, engine_id=PEER, routing_id=b"core".hex())
        core.call(Connect(PEER, f"tcp://127.0.0.1:{port}", msgspec.json.encode(peer).decode()))
        _send_when_there(owner, [b"core", broken])
        _send_when_there(owner, [b"core", encode(Fail(Key(7, 0), "late"))])
        assert heard.get(timeout=DEADLINE_MS / 1e3) == Fail(Key(7, 0), "late")


def test_a_busy_api_process_is_waited_for(tmp_path: Path) -> None:
    """A step takes milliseconds, and encoding a long prompt, or a stop and continue, takes the API process seconds."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as api:
        api.bind(f"ipc://{tmp_path}/core")
        with dial_api(context, f"ipc://{tmp_path}/core") as core:
            for _ in range(20_000):
                core.send(b"a step's deltas", zmq.NOBLOCK)
            assert api.recv() == b"a step's deltas"


def _send_when_there(owner: zmq.Socket[bytes], frames: list[bytes]) -> None:
    until = time.monotonic() + DEADLINE_MS / 1e3
    while True:
        try:
            owner.send_multipart(frames)
            return
        except zmq.ZMQError:  # it has not dialled yet
            assert time.monotonic() < until, "the core never dialled"
            time.sleep(0.01)
