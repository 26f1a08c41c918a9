"""How a peer is told that a pool can be read. Imports no NumPy: the proxy reads offers too."""

from __future__ import annotations

from typing import Annotated

import msgspec

from kvtransfer.layout import MAX_POOL_BYTES


class TransportOffer(msgspec.Struct, frozen=True, kw_only=True):
    """One way to read a pool. Travels as JSON inside `endpoint_info`; `address` is the transport's own business."""

    transport: str  # "shm" | "tcp"
    host_id: str  # equal on two endpoints that share a kernel: boot id plus network namespace
    address: dict[str, str | int]
    pool_bytes: Annotated[int, msgspec.Meta(ge=1, le=2 * MAX_POOL_BYTES)]  # with what lies behind the pool
