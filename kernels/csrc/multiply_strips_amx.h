// Products of strips with the tiles of AMX: the lanes make the weights of two steps, the tiles multiply them.
#pragma once

#include "expand_lanes.h"
#include "multiply_amx.h"

namespace tandem::TANDEM_ISA_NAMESPACE {

constexpr int64_t panel_step_items = step_weights * panel_columns;
constexpr int64_t steps_at_once = 2;  // going from lanes to tiles and back costs; more would crowd the cache

// Where the weights of each step go.
struct Expansion {
    const Strip* strips;
    int64_t steps;
    BFloat16* scratch;
    int64_t scratch_steps;  // then from its start again: what nobody will read again stays in the first-level cache

    // The weights of a step, made where they were not yet.
    const char* step(int64_t index) const {
        if (index % steps_at_once == 0) {
            const int64_t end = index + steps_at_once < steps ? index + steps_at_once : steps;
            for (int64_t i = index; i < end; i++) expand_tiles(strips, i, place(i));
        }
        return reinterpret_cast<const char*>(place(index));
    }

    BFloat16* place(int64_t step) const { return scratch + step % scratch_steps * panel_step_items; }
};

inline void multiply_16_rows(const Expansion& expansion, const char* input, int64_t row_bytes, float* block) {
    TANDEM_TILE_ZERO(0);
    TANDEM_TILE_ZERO(1);
    for (int64_t step = 0; step < expansion.steps; step++, input += tile_row_bytes) {
        const char* const weights = expansion.step(step);
        TANDEM_TILE_LOAD(4, input, row_bytes);
        TANDEM_TILE_LOAD(6, weights, tile_row_bytes);
        TANDEM_TILE_PRODUCT(0, 4, 6);
        TANDEM_TILE_LOAD(7, weights + tile_bytes, tile_row_bytes);
        TANDEM_TILE_PRODUCT(1, 4, 7);
    }
    TANDEM_TILE_STORE(0, block, block_bytes);
    TANDEM_TILE_STORE(1, block + tile_rows, block_bytes);
}

inline void multiply_32_rows(const Expansion& expansion, const char* input, int64_t row_bytes, float* block) {
    TANDEM_TILE_ZERO(0);
    TANDEM_TILE_ZERO(1);
    TANDEM_TILE_ZERO(2);
    TANDEM_TILE_ZERO(3);
    const char* lower = input + tile_rows * row_bytes;
    for (int64_t step = 0; step < expansion.steps; step++) {
        const char* const weights = expansion.step(step);
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

inline void multiply_strips_amx(const Strip* strips, int64_t steps, BFloat16* scratch, const Input& input,
                                int64_t first_row, int64_t num_rows, int64_t panel_index, const Output& output) {
    set_whole_tiles();
    const int64_t count = num_rows < block_rows ? num_rows : block_rows;
    const Expansion expansion = {strips, steps, scratch, num_rows <= block_rows ? steps_at_once : steps};
    alignas(64) float block[block_rows * panel_columns];
    const char* const items = static_cast<const char*>(input.items) + first_row * input.row_bytes;
    if (count <= tile_rows) {
        multiply_16_rows(expansion, items, input.row_bytes, block);
    } else {
        multiply_32_rows(expansion, items, input.row_bytes, block);
    }
    finish_block(block, first_row, count, panel_index, output);
    if (num_rows == count) return;
    multiply_blocks(reinterpret_cast<const char*>(scratch), steps, input, first_row + count, num_rows - count,
                    panel_index, output);
}

}  // namespace tandem::TANDEM_ISA_NAMESPACE
