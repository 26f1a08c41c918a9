"""Head norms, rotary embedding and KV store in one pass over the fused projection. For CUDA."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMS norm over each query and key head, before rotation."""

    query: Tensor  # [head_dim]
    key: Tensor  # [head_dim]
    epsilon: float


def rotate_and_store(
    projected: Tensor,  # [tokens, (heads + 2 * kv_heads) * head_dim], contiguous: queries, keys, values
    turns: Tensor,  # [positions, head_dim] float32: cosines of the head_dim / 2 pairs, then their sines
    positions: Tensor,  # [tokens] int64
    slots: Tensor,  # [tokens] int64: block * block_size + offset; negative: this token's KV is not stored
    keys: Tensor,  # [blocks, kv_heads, block_size, head_dim], a view into the pool, head_dim contiguous
    values: Tensor,  # the same, with the same strides
    norms: HeadNorms | None = None,
) -> Tensor:
    """Rotates queries and keys by pairs (i, i + head_dim / 2) and writes keys and values into the pool. Returns the
    queries, [tokens, heads, head_dim]. Rotation is in float32, rounded once."""
    assert projected.is_contiguous()
    assert keys.stride() == values.stride()
    assert keys.stride(3) == 1
    num_tokens, (num_kv_heads, block_size, head_dim) = len(projected), keys.shape[1:]
    num_heads = projected.shape[1] // head_dim - 2 * num_kv_heads
    share = num_heads // num_kv_heads
    queries = torch.empty((num_tokens, num_heads, head_dim), dtype=projected.dtype, device=projected.device)
    _rotate_and_store[(num_tokens, num_kv_heads)](
        projected,
        turns,
        positions,
        slots,
        queries,
        keys,
        values,
        norms.query if norms else projected,
        norms.key if norms else projected,
        norms.epsilon if norms else 0.0,
        num_kv_heads,
        *keys.stride()[:3],
        NORMS=norms is not None,
        SHARE=share,
        SHARE_BLOCK=triton.next_power_of_2(share),
        HALF=head_dim // 2,
        HALF_BLOCK=triton.next_power_of_2(head_dim // 2),
        BLOCK_SIZE=block_size,
        num_warps=2,
    )
    return queries


@triton.jit
def _rotate_and_store(
    projected, turns, positions, slots, queries, keys, values, query_norm, key_norm, epsilon, num_kv_heads,
    block_stride, head_stride, token_stride, NORMS: tl.constexpr, SHARE: tl.constexpr, SHARE_BLOCK: tl.constexpr,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """One program a token and KV head, with the query heads that share it."""
    token, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair, member = tl.arange(0, HALF_BLOCK), tl.arange(0, SHARE_BLOCK)
    inside = pair < HALF
    turn = tl.load(positions + token) * (2 * HALF) + pair
    cosine = tl.load(turns + turn, mask=inside, other=0.0)
    sine = tl.load(turns + turn + HALF, mask=inside, other=0.0)

    row = projected + token * (SHARE + 2) * num_kv_heads * (2 * HALF)
    head = kv_head * SHARE + member
    both = (member < SHARE)[:, None] & inside[None, :]
    place = head[:, None] * (2 * HALF) + pair[None, :]  # [members, pairs]
    first, second = _pairs(row, place, both, query_norm, pair[None, :], epsilon, NORMS, HALF)
    output = queries + token * SHARE * num_kv_heads * (2 * HALF) + place
    kind = queries.dtype.element_ty
    tl.store(output, (first * cosine[None, :] - second * sine[None, :]).to(kind), mask=both)
    tl.store(output + HALF, (second * cosine[None, :] + first * sine[None, :]).to(kind), mask=both)

    slot = tl.load(slots + token)
    stored = pair < tl.where(slot >= 0, HALF, 0)
    target = (slot // BLOCK_SIZE) * block_stride + kv_head * head_stride + (slot % BLOCK_SIZE) * token_stride + pair
    from_key = (SHARE * num_kv_heads + kv_head) * (2 * HALF) + pair
    first, second = _pairs(row, from_key[None, :], inside[None, :], key_norm, pair[None, :], epsilon, NORMS, HALF)
    turned = tl.reshape(first * cosine[None, :] - second * sine[None, :], (HALF_BLOCK,))
    tl.store(keys + target, turned.to(kind), mask=stored)
    turned = tl.reshape(second * cosine[None, :] + first * sine[None, :], (HALF_BLOCK,))
    tl.store(keys + target + HALF, turned.to(kind), mask=stored)

    from_value = from_key + num_kv_heads * (2 * HALF)
    tl.store(values + target, tl.load(row + from_value, mask=stored, other=0.0), mask=stored)
    tl.store(values + target + HALF, tl.load(row + from_value + HALF, mask=stored, other=0.0), mask=stored)


@triton.jit
def _pairs(row, place, inside, weight, pair, epsilon, NORMS: tl.constexpr, HALF: tl.constexpr):
    """Both halves of some heads, [heads, pairs] float32, normed where the model does."""
    first = tl.load(row + place, mask=inside, other=0.0)
    second = tl.load(row + place + HALF, mask=inside, other=0.0)
    kind = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    if NORMS:
        squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        scale = tl.rsqrt(squares / (2 * HALF) + epsilon)[:, None]
        low = tl.load(weight + pair, mask=pair < HALF, other=0.0).to(tl.float32)
        high = tl.load(weight + pair + HALF, mask=pair < HALF, other=0.0).to(tl.float32)
        first = ((first * scale).to(kind).to(tl.float32) * low).to(kind).to(tl.float32)
        second = ((second * scale).to(kind).to(tl.float32) * high).to(kind).to(tl.float32)
    return first, second
