// Products with the tiles of AMX: 32 rows by 32 columns in four of the eight, or 16 rows in two where no more are left.
#pragma once

#include "finish_lanes.h"
#include "multiply_lanes.h"
#include "tiles_amx.h"

namespace tandem::TANDEM_ISA_NAMESPACE {

constexpr int64_t block_bytes = panel_columns * sizeof(float);  // from row to row of a block of products

// Few rows read each weight once, from memory: lines are asked for well before they are needed.
template <bool ahead>
inline void prefetch_tiles(const char* weights) {
    if constexpr (ahead) {
        for (int64_t line = 0; line < 2 * tile_bytes; line += tile_row_bytes) prefetch(weights + line);
    }
}

template <bool ahead>
void multiply_16_rows(const char* weights, int64_t steps, const char* input, int64_t row_bytes, float* block) {
    TANDEM_TILE_ZERO(0);
    TANDEM_TILE_ZERO(1);
    for (int64_t step = 0; step < steps; step++, weights += 2 * tile_bytes, input += tile_row_bytes) {
        prefetch_tiles<ahead>(weights);
        TANDEM_TILE_LOAD(4, input, row_bytes);
        TANDEM_TILE_LOAD(6, weights, tile_row_bytes);
        TANDEM_TILE_PRODUCT(0, 4, 6);
        TANDEM_TILE_LOAD(7, weights + tile_bytes, tile_row_bytes);
        TANDEM_TILE_PRODUCT(1, 4, 7);
    }
    TANDEM_TILE_STORE(0, block, block_bytes);
    TANDEM_TILE_STORE(1, block + tile_rows, block_bytes);
}

template <bool ahead>
void multiply_32_rows(const char* weights, int64_t steps, const char* input, int64_t row_bytes, float* block) {
    TANDEM_TILE_ZERO(0);
    TANDEM_TILE_ZERO(1);
    TANDEM_TILE_ZERO(2);
    TANDEM_TILE_ZERO(3);
    const char* lower = input + tile_rows * row_bytes;
    for (int64_t step = 0; step < steps; step++, weights += 2 * tile_bytes) {
        prefetch_tiles<ahead>(weights);
        TANDEM_TILE_LOAD(6, weights, tile_row_bytes);
        TANDEM_TILE_LOAD(4, input + step * tile_row_bytes, row_bytes);
        TANDEM_TILE_PRODUCT(0, 4, 6);
        TANDEM_TILE_LOAD(7, weights + tile_bytes, tile_row_bytes);
        TANDEM_TILE_PRODUCT(1, 4, 7);
        TANDEM_TILE_LOAD(5, lower + step * tile_row_bytes, row_bytes);
        TANDEM_TILE_PRODUCT(2, 5, 6);
        TANDEM_TILE_PRODUCT(3, 5, 7);
    }
    TANDEM_TILE_STORE(0, block, block_bytes);
    TANDEM_TILE_STORE(1, block + tile_rows, block_bytes);
    TANDEM_TILE_STORE(2, block + tile_rows * panel_columns, block_bytes);
    TANDEM_TILE_STORE(3, block + tile_rows * panel_columns + tile_rows, block_bytes);
}

inline void finish_block(const float* block, int64_t row, int64_t num_rows, int64_t panel_index,
                         const Output& output) {
    for (int64_t i = 0; i < num_rows; i++) {
        const float* const products = block + i * panel_columns;
        finish(output, row + i, panel_index, {load(products), load(products + num_lanes)});
    }
}

template <bool ahead>
void multiply_block(const char* weights, int64_t steps, const Input& input, int64_t row, int64_t num_rows,
                    int64_t panel_index, const Output& output) {
    alignas(64) float block[block_rows * panel_columns];
    const char* const items = static_cast<const char*>(input.items) + row * input.row_bytes;
    if (num_rows <= tile_rows) {
        multiply_16_rows<ahead>(weights, steps, items, input.row_bytes, block);
    } else {
        multiply_32_rows<ahead>(weights, steps, items, input.row_bytes, block);
    }
    finish_block(block, row, num_rows, panel_index, output);
}

// Rows of a panel that lies in the cache.
inline void multiply_blocks(const char* weights, int64_t steps, const Input& input, int64_t first_row,
                            int64_t num_rows, int64_t panel_index, const Output& output) {
    const int64_t last = first_row + num_rows;
    for (int64_t row = first_row; row < last; row += block_rows) {
        const int64_t count = last - row < block_rows ? last - row : block_rows;
        multiply_block<false>(weights, steps, input, row, count, panel_index, output);
    }
}

// The first block of rows brings the panel into the cache; the others find it there.
inline void multiply_bfloat16_amx(const BFloat16* panel, int64_t steps, const Input& input, int64_t first_row,
                                  int64_t num_rows, int64_t panel_index, const Output& output) {
    set_whole_tiles();
    const char* const weights = reinterpret_cast<const char*>(panel);
    const int64_t last = first_row + num_rows;
    const int64_t second = first_row + block_rows < last ? first_row + block_rows : last;
    multiply_block<true>(weights, steps, input, first_row, second - first_row, panel_index, output);
    multiply_blocks(weights, steps, input, second, last - second, panel_index, output);
}

}  // namespace tandem::TANDEM_ISA_NAMESPACE
