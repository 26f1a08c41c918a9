// One step's tokens, and where in the pool each has its keys and values.
#pragma once

#include "pool.h"

namespace tandem {

// One step's tokens. Row i's are [starts[i], starts[i + 1]), the last of the `lengths[i]` that its sequence then has. Rows
// of one sequence stand next to one another, in its order.
struct Batch {
    const int64_t* tokens;  // [num_tokens]
    int64_t num_tokens;
    const int64_t* starts;   // [num_rows + 1]
    const int64_t* lengths;  // [num_rows]
    int64_t num_rows;
    const int64_t* block_tables;  // [num_rows, table_length]
    int64_t table_length;
    const int64_t* sampled;  // [num_sampled]: tokens whose logits are wanted
    int64_t num_sampled;

    int64_t num_new(int64_t row) const { return starts[row + 1] - starts[row]; }
    const int64_t* blocks(int64_t row) const { return block_tables + row * table_length; }
};

// Throws std::out_of_range when the batch points outside the pool, the vocabulary or itself.
void check_batch(const Batch& batch, const Pool& pool, int64_t vocab_size);

}  // namespace tandem
