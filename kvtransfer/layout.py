"""Where a token's keys and values lie in a pool. Imports no NumPy: the proxy and the API processes read layouts too.

A pool is block-major, `[block][layer][k|v][kv_head][token][dim]`: one block is one contiguous run over all layers, so
equal layouts move in few large copies; a range of heads stays contiguous within each K or V plane.
"""

from __future__ import annotations

import msgspec

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MAX_POOL_BYTES = 1 << 48  # no address space is larger; keeps every offset far inside an int64


class KVLayout(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of one rank's pool. Heads [first_head, first_head + num_kv_heads) of the model's `total_kv_heads`."""

    num_blocks: int
    block_size: int  # tokens
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    first_head: int = 0
    total_kv_heads: int = 0  # 0: num_kv_heads, no tensor parallelism

    def __post_init__(self) -> None:
        """Layouts come from peers: one that describes nothing real is refused where it is parsed. Raises ValueError."""
        sizes = (self.num_blocks, self.block_size, self.num_layers, self.num_kv_heads, self.head_dim)
        if min(sizes) < 1 or max(sizes) > MAX_POOL_BYTES:
            raise ValueError(f"every size of a KV layout must be positive, got {sizes}")
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"KV dtype {self.dtype!r} is not one of {', '.join(ITEM_BYTES)}")
        if self.first_head < 0 or self.total_kv_heads < 0 or self.first_head + self.num_kv_heads > self.model_kv_heads:
            raise ValueError(f"heads from {self.first_head} by {self.num_kv_heads} are not in {self.model_kv_heads}")
        if self.pool_bytes > MAX_POOL_BYTES:
            raise ValueError(f"a pool of {self.pool_bytes} bytes is larger than any address space")

    @property
    def model_kv_heads(self) -> int:
        """KV heads of the whole model, over all tensor-parallel ranks."""
        return self.total_kv_heads or self.num_kv_heads

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """One token of one head of one plane."""
        return self.head_dim * self.item_bytes

    @property
    def head_bytes(self) -> int:
        """One head of one plane of one block: [token][dim]."""
        return self.block_size * self.token_bytes

    @property
    def plane_bytes(self) -> int:
        """One K or V of one layer of one block: [kv_head][token][dim]."""
        return self.num_kv_heads * self.head_bytes

    @property
    def block_bytes(self) -> int:
        return self.num_layers * 2 * self.plane_bytes

    @property
    def pool_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def heads(self) -> tuple[int, int]:
        """The model's heads that this rank holds, as a half-open range."""
        return self.first_head, self.first_head + self.num_kv_heads
