"""The messages that engines send each other: pairing information and the control channel.

LMDeploy's proxy carries `endpoint_info` between engines as an opaque string, so everything of ours travels inside it.
The control channel is ZMQ: every engine core binds one ROUTER; the reader's DEALER connects to it under a routing id
that the owner handed out in its endpoint information, which is how the owner knows who speaks.

    D ── Want ─────────────▶ P      decode has reserved its blocks
    D ◀───────────── Ready ─ P      more full blocks are computed (repeats)
    D ◀────────────── Done ─ P      the prompt is computed; the first token
    D ══ reads the epoch word ══    the last read has ended; was the lease alive throughout?
    D ── Release ──────────▶ P      the hand-off is over, read or not; idempotent
    D ── Renew ────────────▶ P      every few seconds while anything is open
    D ◀────────────── Fail ─ P      this hand-off will not come

The epoch is not asked for by message, because the owner's thread may be deep in a forward pass. The owner keeps one
64-bit word for each lease behind its pool: the lease's epoch while it lives, 0 from the moment it ends. The reader
pulls that word like any other bytes, after its last read; one-sided, so it costs the owner nothing and works the same
over RDMA.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec

from kvtransfer.layout import KVLayout
from kvtransfer.offer import TransportOffer

PROTOCOL_VERSION = 1
MAX_CONTROL_BYTES = 1 << 20  # a Done of 100,000 block ids fits
# What decoding a stranger's bytes can raise: DecodeError alone does not cover broken UTF-8 or nesting without end.
MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class MigrationProtocol(IntEnum):
    """LMDeploy's integers. A preference: engines of ours use the best transport that both offer."""

    TCP = 1
    RDMA = 2
    NVLINK = 3


class RDMALinkType(IntEnum):
    IB = 1
    ROCE = 2


class ConnectionStatus(IntEnum):
    SUCCESS = 1
    FAIL = 2


class EndpointInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine tells one named peer at p2p_initialize; JSON inside LMDeploy's `endpoint_info` string."""

    tandem: int  # PROTOCOL_VERSION
    engine_id: str
    incarnation: str  # new at every start of the engine
    model: str
    layout: KVLayout
    offers: list[TransportOffer]
    routing_id: str  # hex; the DEALER identity this peer must use on our control channel
    secret: str  # hex; with the cluster key it proves this peer to our transports. Drawn for this link alone


class Key(msgspec.Struct, frozen=True, array_like=True):
    """Names one hand-off between two engines."""

    session: int
    index: int


class Want(msgspec.Struct, frozen=True, array_like=True, tag=1):
    key: Key
    incarnation: str  # of the owner, as the reader knows it: another one refuses
    promised: bool  # the owner's part may still be on its way; otherwise an unknown key fails at once


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=2):
    key: Key
    epoch: int
    epoch_slot: int  # which epoch word behind the owner's pool
    blocks: list[int]  # the next blocks, in order, after those announced before
    num_computed: int  # tokens readable in all blocks announced so far


class Done(msgspec.Struct, frozen=True, array_like=True, tag=3):
    key: Key
    epoch: int
    epoch_slot: int
    blocks: list[int]
    num_computed: int  # the prompt's length
    first_token: int
    logprobs: bytes  # msgpack of the first token's log-probabilities, or empty
    num_cached: int  # prompt tokens that prefill found in its prefix cache


class Fail(msgspec.Struct, frozen=True, array_like=True, tag=4):
    key: Key
    reason: str
    unknown: bool = False  # the owner holds no such session: forged, expired or already read


class Release(msgspec.Struct, frozen=True, array_like=True, tag=5):
    key: Key


class Renew(msgspec.Struct, frozen=True, array_like=True, tag=6):
    keys: list[Key]


FromReader = Want | Release | Renew
FromOwner = Ready | Done | Fail
