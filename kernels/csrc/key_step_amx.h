// The keys and values of a step, where the tiles of AMX find them: keys as they lie in the cache, a tile of 16 after the
// other, and the values interleaved by pairs of tokens, once for all queries of the piece.
#pragma once

#include <immintrin.h>

#include "cache_ahead.h"
#include "tiles_amx.h"

namespace tandem::TANDEM_ISA_NAMESPACE {

constexpr int64_t tile_keys = 16;    // of keys × queriesᵀ
constexpr int64_t tile_tokens = 32;  // of weights × values
constexpr int64_t tile_dims = 32;    // of keys × queriesᵀ; of weights × values in two tiles, one for each half line
constexpr int64_t most_tile_dims = 512;
// Of tokens past the end: what lies there may be anything, NaN too.
alignas(64) constexpr char no_values[most_tile_dims * sizeof(BFloat16)] = {};

struct KeyStep {
    const AttentionShape& shape;
    const AttentionPiece& piece;
    int64_t row_bytes;
    int64_t first, count, num_key_tiles, num_token_tiles;
    const char* runs[key_step / tile_keys];  // of 16 keys each
    int64_t value_offset;                    // from a key to its value
    char *values, *gathered;

    KeyStep(const AttentionShape& shape, const AttentionPiece& piece)
        : shape(shape), piece(piece), row_bytes(shape.head_dim * static_cast<int64_t>(sizeof(BFloat16))) {}

    void place(char* scratch) {
        values = scratch;
        gathered = values + key_step * row_bytes;
    }

    void open(int64_t first_key) {
        first = first_key;
        count = piece.end_key - first < key_step ? piece.end_key - first : key_step;
        num_key_tiles = (count + tile_keys - 1) / tile_keys;
        num_token_tiles = (count + tile_tokens - 1) / tile_tokens;
        value_offset = shape.side_bytes;
        if (shape.block_size < tile_keys) return gather();
        for (int64_t i = 0; i < num_key_tiles; i++) runs[i] = cached_key(shape, piece, first + i * tile_keys);
    }

    // Keys of small blocks do not lie in runs of a tile's length.
    void gather() {
        value_offset = key_step * row_bytes;
        for (int64_t i = 0; i < num_key_tiles; i++) runs[i] = gathered + i * tile_keys * row_bytes;
        for (int64_t i = 0; i < count; i++) {
            const char* const from = cached_key(shape, piece, first + i);
            memcpy(gathered + i * row_bytes, from, row_bytes);
            memcpy(gathered + value_offset + i * row_bytes, from + shape.side_bytes, row_bytes);
        }
    }

    const char* value(int64_t token) const {
        if (token >= count) return no_values;
        return runs[token / tile_keys] + value_offset + token % tile_keys * row_bytes;
    }

    // [64 tokens][dims] to tiles [2][dims / 16][16 pairs of tokens][16 dims][2]. Within each 32 dims the first tile gets
    // four of every eight, as the processor interleaves them; who reads the sums restores the order.
    template <class Meanwhile>
    void interleave_values(Meanwhile meanwhile) const {
        for (int64_t pair = 0; pair < num_token_tiles * tile_rows; pair++) {
            meanwhile(pair);
            const char *from = value(2 * pair), *next = value(2 * pair + 1);
            char* to = values + pair / tile_rows * tile_tokens * row_bytes + pair % tile_rows * tile_row_bytes;
            for (int64_t offset = 0; offset < row_bytes; offset += tile_row_bytes, to += 2 * tile_bytes) {
                const __m512i a = _mm512_loadu_si512(from + offset), b = _mm512_loadu_si512(next + offset);
                _mm512_store_si512(to, _mm512_unpacklo_epi16(a, b));
                _mm512_store_si512(to + tile_bytes, _mm512_unpackhi_epi16(a, b));
            }
        }
    }
};

}  // namespace tandem::TANDEM_ISA_NAMESPACE
