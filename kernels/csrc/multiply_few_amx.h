// Products of few rows with strips of 4-bit codes. The weights are the left tiles, [columns][k], and the inputs, in pairs
// of k, the right ones: the very products and sums of multiply_strips_amx, of which each tile comes out turned.
#pragma once

#include "finish_lanes.h"
#include "lookup_amx.h"
#include "multiply_amx.h"
#include "transpose_avx512.h"

namespace tandem::TANDEM_ISA_NAMESPACE {

constexpr int64_t pair_bytes = 2 * sizeof(BFloat16);

// Registers 0 to 3 take sums, 4 and 5 weights, 6 and 7 inputs of so many rows.
inline void set_tiles_of_few(int64_t width) {
    if (width == tile_rows) return set_whole_tiles();
    if (tiles_set == Tiles::few && tiles_width == width) return;
    TileShapes shapes;
    for (const int tile : {0, 1, 2, 3, 6, 7}) shapes.row_bytes[tile] = static_cast<uint16_t>(width * pair_bytes);
    set_tiles(Tiles::few, shapes);
    tiles_width = width;
}

inline int64_t width_of_few(int64_t num_rows) { return num_rows < tile_rows ? num_rows : tile_rows; }

inline void pair_up(const Input& input, int64_t num_rows, int64_t steps, char* pairs) {
    const int64_t width = width_of_few(num_rows);
    const __mmask16 wanted = static_cast<__mmask16>((1 << width) - 1);
    for (int64_t row = 0; row < num_rows; row += tile_rows) {
        const char* items = static_cast<const char*>(input.items) + row * input.row_bytes;
        for (int64_t step = 0; step < steps; step++, items += tile_row_bytes) {
            __m512i lines[tile_rows];
            for (int64_t i = 0; i < tile_rows; i++) {
                lines[i] = i < width ? _mm512_loadu_si512(items + i * input.row_bytes) : _mm512_setzero_si512();
            }
            transpose(lines);
            for (int64_t i = 0; i < tile_rows; i++, pairs += width * pair_bytes) {
                _mm512_mask_storeu_epi32(pairs, wanted, lines[i]);
            }
        }
    }
}

// A panel's sums: [16 rows at a time][strip][16 columns][those rows].
struct TurnedSums {
    alignas(64) float items[2][2][tile_rows * tile_rows];
};

// `both`: more than 16 rows, whose second half has its pairs behind the first's.
template <bool both, Format format>
void sum_rows(Lookup<format>& lookup, int64_t steps, const char* pairs, int64_t width, TurnedSums& sums) {
    const int64_t line_bytes = width * pair_bytes, pair_tile_bytes = step_pairs * line_bytes;
    TANDEM_TILE_ZERO(0);
    TANDEM_TILE_ZERO(1);
    if constexpr (both) {
        TANDEM_TILE_ZERO(2);
        TANDEM_TILE_ZERO(3);
    }
    for (int64_t step = 0; step < steps; step++, pairs += pair_tile_bytes) {
        const char* const weights = lookup.next();
        TANDEM_TILE_LOAD(6, pairs, line_bytes);
        TANDEM_TILE_LOAD(4, weights, tile_row_bytes);
        TANDEM_TILE_PRODUCT(0, 4, 6);
        TANDEM_TILE_LOAD(5, weights + tile_bytes, tile_row_bytes);
        TANDEM_TILE_PRODUCT(1, 5, 6);
        if constexpr (both) {
            TANDEM_TILE_LOAD(7, pairs + steps * pair_tile_bytes, line_bytes);
            TANDEM_TILE_PRODUCT(2, 4, 7);
            TANDEM_TILE_PRODUCT(3, 5, 7);
        }
    }
    TANDEM_TILE_STORE(0, sums.items[0][0], line_bytes);
    TANDEM_TILE_STORE(1, sums.items[0][1], line_bytes);
    if constexpr (both) {
        TANDEM_TILE_STORE(2, sums.items[1][0], line_bytes);
        TANDEM_TILE_STORE(3, sums.items[1][1], line_bytes);
    }
}

// A block of sums, turned to [rows][32 columns].
inline void turn_sums(const TurnedSums& sums, int64_t num_rows, float* block) {
    const int64_t width = width_of_few(num_rows);
    const __mmask16 wanted = static_cast<__mmask16>((1 << width) - 1);
    for (int64_t row = 0; row < num_rows; row += tile_rows) {
        for (int64_t strip = 0; strip < 2; strip++) {
            __m512i lines[tile_rows];
            const float* const from = sums.items[row / tile_rows][strip];
            for (int64_t i = 0; i < tile_rows; i++) lines[i] = _mm512_maskz_loadu_epi32(wanted, from + i * width);
            transpose(lines);
            for (int64_t i = 0; i < width; i++) {
                _mm512_store_si512(block + (row + i) * panel_columns + strip * strip_columns, lines[i]);
            }
        }
    }
}

template <Format format>
void sum_few_of(const Strip* strips, int64_t steps, const Input& input, int64_t num_rows, TurnedSums& sums) {
    Lookup<format> lookup(strips, steps);
    if (num_rows > tile_rows) return sum_rows<true>(lookup, steps, input.pairs, tile_rows, sums);
    sum_rows<false>(lookup, steps, input.pairs, num_rows, sums);
}

inline void sum_few(const Strip* strips, int64_t steps, const Input& input, int64_t num_rows, TurnedSums& sums) {
    switch (strips[0].format) {
        case Format::q4_0: return sum_few_of<Format::q4_0>(strips, steps, input, num_rows, sums);
        case Format::q4_1: return sum_few_of<Format::q4_1>(strips, steps, input, num_rows, sums);
        default: return sum_few_of<Format::q4_k>(strips, steps, input, num_rows, sums);
    }
}

inline void multiply_few(const Strip* strips, int64_t steps, const Input& input, int64_t num_rows, int64_t panel_index,
                         const Output& output) {
    set_tiles_of_few(width_of_few(num_rows));
    TurnedSums sums;
    sum_few(strips, steps, input, num_rows, sums);
    if (num_rows == 1) return finish(output, 0, panel_index, {load(sums.items[0][0]), load(sums.items[0][1])});
    alignas(64) float block[block_rows * panel_columns];
    turn_sums(sums, num_rows, block);
    finish_block(block, 0, num_rows, panel_index, output);
}

}  // namespace tandem::TANDEM_ISA_NAMESPACE
