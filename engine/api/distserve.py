"""The cluster's wire: every body of /distserve and /nodes, as LMDeploy's proxy and engines write them.

Whatever is private to us travels inside `endpoint_info` strings or in the hand-off header, because LMDeploy's proxy
drops fields that it does not know. Unknown fields are ignored here for the same reason.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, Final

import msgspec

from engine.api.decoding import decode_json
from engine.core import Role
from kvtransfer.protocol import ConnectionStatus, MigrationProtocol, RDMALinkType

EngineRole = Role

HANDOFF_HEADER: Final = "X-Tandem-Handoff"
HEARTBEAT_HEADER: Final = "X-Tandem-Heartbeat"  # on the reply to /nodes/add: adding a node again is a heartbeat here
MAX_SESSION: Final = 2**53 - 1  # what every JSON reader keeps exact

Session = Annotated[int, msgspec.Meta(ge=0, le=MAX_SESSION)]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
BlockId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
EngineId = Annotated[str, msgspec.Meta(pattern=r"^[\x21-\x7e]{1,200}\Z")]  # a URL; transports say it in a short hello


class ServingStrategy(IntEnum):
    HYBRID = 1
    DIST_SERVE = 2


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The reply of GET /distserve/engine_info, there encoded twice: see `encode_engine_info`."""

    tp_size: int = 1
    ep_size: int = 1
    dp_size: int = 1
    pp_size: int | None = None
    dp_rank: int = 0
    block_size: int  # tokens
    num_cpu_blocks: int = 0
    num_gpu_blocks: int


class TCPConfig(msgspec.Struct, frozen=True):
    pass


class NVLinkConfig(msgspec.Struct, frozen=True):
    pass


class RDMAConfig(msgspec.Struct, frozen=True, kw_only=True):
    with_gdr: bool = True
    link_type: RDMALinkType = RDMALinkType.ROCE


class InitializeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /distserve/p2p_initialize: get ready to be linked with `remote_engine_id`."""

    local_engine_id: EngineId
    local_engine_config: EngineConfig
    remote_engine_id: EngineId
    remote_engine_config: EngineConfig
    protocol: MigrationProtocol
    rank: int | None = None
    tcp_config: TCPConfig | None = None
    rdma_config: RDMAConfig | None = None
    nvlink_config: NVLinkConfig | None = None


class EngineEndpoint(msgspec.Struct, frozen=True):
    """Where the engine core's control channel listens."""

    zmq_address: Annotated[str, msgspec.Meta(min_length=1, max_length=2048)]


class TransferEndpoint(msgspec.Struct, frozen=True):
    """How to reach one tensor-parallel rank's pool. `endpoint_info` is JSON in a string, private to the engines: ours
    is `kvtransfer.protocol.EndpointInfo`."""

    protocol: MigrationProtocol
    endpoint_info: str


class InitializeResponse(msgspec.Struct, frozen=True, kw_only=True):
    status: ConnectionStatus
    engine_endpoint_info: EngineEndpoint
    kvtransfer_endpoint_info: list[TransferEndpoint]


class ConnectRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /distserve/p2p_connect: what the peer answered to its p2p_initialize."""

    protocol: MigrationProtocol
    remote_engine_id: EngineId
    remote_engine_endpoint_info: EngineEndpoint
    remote_kvtransfer_endpoint_info: list[TransferEndpoint]


class ConnectResponse(msgspec.Struct, frozen=True):
    status: ConnectionStatus


class DropConnectRequest(msgspec.Struct, frozen=True):
    """POST /distserve/p2p_drop_connect. `engine_id` is the one that is asked."""

    engine_id: EngineId
    remote_engine_id: EngineId


class DropConnectResponse(msgspec.Struct, frozen=True):
    success: bool = True


class FreeCacheRequest(msgspec.Struct, frozen=True):
    """POST /distserve/free_cache: `remote_engine_id` names the reader when the owner is asked, and the owner when the
    reader is told that the session's KV will not come."""

    remote_engine_id: EngineId
    remote_session_id: Session


class FreeCacheResponse(msgspec.Struct, frozen=True):
    status: str = "SUCCESS"


class MigrationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Stands in a completion body for decode: whose KV to pull. With `is_dummy_prefill` nobody holds any."""

    protocol: MigrationProtocol
    remote_engine_id: str
    remote_session_id: Session
    remote_token_id: TokenId
    remote_block_ids: list[BlockId]
    is_dummy_prefill: bool = False


class GiveHeader(msgspec.Struct, frozen=True, kw_only=True, tag="give", tag_field="type"):
    """In X-Tandem-Handoff, to prefill: hold the KV as `session` for `peer` to pull."""

    session: Session
    peer: EngineId


class TakeHeader(msgspec.Struct, frozen=True, kw_only=True, tag="take", tag_field="type"):
    """In X-Tandem-Handoff, to decode: pull the KV of `session` from `peer`."""

    session: Session
    peer: EngineId


HandoffHeader = GiveHeader | TakeHeader


class Status(msgspec.Struct, kw_only=True):
    """What the proxy knows of a node. `latency` holds the last 15, in seconds; `speed` is a relative weight.

    `incarnation` is ours: an engine says it with every registration, so that the proxy can tell a heartbeat from a
    restart. Absent on the wire wherever it is not set.
    """

    role: EngineRole = EngineRole.HYBRID
    models: list[str] | None = []
    unfinished: int = 0
    latency: list[float] = []
    speed: int | float | None = None
    incarnation: str | msgspec.UnsetType = msgspec.UNSET


class Node(msgspec.Struct, kw_only=True):
    """POST /nodes/add, /nodes/remove, /nodes/terminate."""

    url: Annotated[str, msgspec.Meta(min_length=1, max_length=2048)]
    status: Status | None = None


class WarmupResponse(msgspec.Struct, frozen=True):
    """POST /distserve/connection_warmup, when every pair is connected."""

    SUCCESS: bool = True


class FlatError(msgspec.Struct, frozen=True, kw_only=True):
    """An error on /nodes and /distserve; `code` is the HTTP status."""

    message: str
    type: str
    code: int
    param: str | None = None
    object: str = "error"


def encode_engine_info(config: EngineConfig) -> bytes:
    """JSON in a JSON string, as LMDeploy's proxy expects it."""
    return msgspec.json.encode(msgspec.json.encode(config).decode())


def decode_engine_info(body: bytes) -> EngineConfig:
    """Both forms: the object itself, or the object as JSON in a string. Raises InvalidRequest."""
    form = decode_json(body, EngineConfig | str)  # type: ignore[arg-type]
    return decode_json(form, EngineConfig) if isinstance(form, str) else form


def encode_handoff(header: HandoffHeader) -> str:
    return msgspec.json.encode(header).decode()


def decode_handoff(value: str) -> HandoffHeader:
    """Raises InvalidRequest."""
    return decode_json(value, HandoffHeader)  # type: ignore[arg-type]
