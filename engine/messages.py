"""What the API process and the core process say to each other: msgpack over ZMQ, one tagged union each way."""

from __future__ import annotations

import msgspec

from engine.core import Delta, ModelInfo, Request, Role

MAX_QUEUED_MESSAGES = 100_000  # each way, minutes of them: when they are not read, the other process is lost


class CoreSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the core needs of the engine's settings; the first thing it is told, on its standard input."""

    model: str
    served_model_name: str
    role: Role
    dtype: str
    quantization: str
    device: str
    num_threads: int | None
    cpu_cores: tuple[int, ...]
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_bytes: int
    block_size: int
    prefix_cache: bool
    transports: tuple[str, ...]
    require_transport: str | None
    transfer_host: str
    cluster_key: bytes
    lease_seconds: float
    handoff_timeout: float
    local_prefill_tokens: int
    max_draft_tokens: int
    log_level: str


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    request: Request


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    request_id: str


class Call(msgspec.Struct, frozen=True, tag="call"):
    """A question that wants one `Reply`."""

    call_id: int
    command: LinkCommand


class Initialize(msgspec.Struct, frozen=True, tag="initialize"):
    """p2p_initialize: make this peer's EndpointInfo. Reply: EndpointInfo."""

    peer: str
    me: str  # the id under which the peer will know this engine


class Connect(msgspec.Struct, frozen=True, tag="connect"):
    """p2p_connect: the peer's control address and its EndpointInfo as JSON. Reply: the transport's name."""

    peer: str
    control_address: str
    endpoint_info: str


class Disconnect(msgspec.Struct, frozen=True, tag="disconnect"):
    """p2p_drop_connect. Idempotent. Reply: None."""

    peer: str


class Free(msgspec.Struct, frozen=True, tag="free"):
    """free_cache. On the owner it ends the lease `session` of ours; on a reader it says that `peer` will not deliver
    `session`, so decode computes the prompt itself. Idempotent. Reply: None."""

    peer: str
    session: int


LinkCommand = Initialize | Connect | Disconnect | Free
ToCore = Submit | Abort | Call


class Reply(msgspec.Struct, frozen=True, tag="reply"):
    """`value` is msgpack of the answer; an error carries the HTTP status it should become."""

    call_id: int
    value: bytes = b""
    error: str | None = None
    status: int = 200


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The core's first message: the model is loaded and the pool is in place."""

    model: ModelInfo
    control_address: str
    incarnation: str


class Stats(msgspec.Struct, frozen=True, kw_only=True, tag="stats"):
    """Sent about once a second, and by an idle core whenever something has changed; counters only grow."""

    num_waiting: int
    waiting_tokens: int  # known and not yet computed, of all sequences
    num_running: int
    num_handoff: int  # hand-offs: EXPECTED, under lease, or PULLING
    blocks_free: int
    blocks_total: int
    steps: int
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    draft_tokens: int
    accepted_tokens: int  # of those
    preemptions: int
    transferred_tokens: int
    recomputed_tokens: int  # prompts decode had to compute because no hand-off came
    local_tokens: int  # of prompts that decode computed itself: short, or prefill was too far behind
    transferred_bytes: int
    pull_seconds: float  # spent copying
    exposed_seconds: float  # of a hand-off's end that prefill did not hide: from the last announcement to belief
    links: list[LinkStats] = []


class LinkStats(msgspec.Struct, frozen=True, kw_only=True):
    peer: str
    transport: str
    gigabytes_per_s: float
    connected: bool


class Deltas(msgspec.Struct, frozen=True, tag="deltas"):
    """All that one step said, in one message."""

    deltas: list[Delta]


FromCore = Ready | Deltas | Reply | Stats
