// The paged cache of keys and values: [block][layer][k|v][kv_head][token][dim], one run of memory.
#pragma once

#include "items.h"

namespace tandem {

struct Pool {
    char* items;
    Kind kind;
    int64_t num_blocks;
    int64_t block_size;  // tokens
    int64_t num_layers;
    int64_t num_kv_heads;
    int64_t head_dim;

    int64_t row_bytes() const { return head_dim * static_cast<int64_t>(item_bytes(kind)); }
    int64_t plane_bytes() const { return block_size * row_bytes(); }  // one head's keys, or values, of one block
    int64_t side_bytes() const { return num_kv_heads * plane_bytes(); }
    int64_t block_bytes() const { return num_layers * 2 * side_bytes(); }
    int64_t num_bytes() const { return num_blocks * block_bytes(); }

    // One head's keys in block 0; its values lie `side_bytes` further, other blocks `block_bytes` apart.
    char* keys(int64_t layer, int64_t kv_head) const {
        return items + layer * 2 * side_bytes() + kv_head * plane_bytes();
    }
};

}  // namespace tandem
