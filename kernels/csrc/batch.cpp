#include "batch.h"

#include <stdexcept>
#include <string>

namespace tandem {
namespace {

void require(bool holds, const char* what, int64_t index, int64_t value) {
    if (holds) return;
    throw std::out_of_range(std::string(what) + " " + std::to_string(index) + " is out of range: " +
                            std::to_string(value));
}

void check_row(const Batch& batch, const Pool& pool, int64_t row) {
    const int64_t count = batch.starts[row + 1] - batch.starts[row], length = batch.lengths[row];
    require(count > 0, "the number of tokens of row", row, count);
    require(length >= count && length <= batch.table_length * pool.block_size, "the length of row", row, length);
    const int64_t* const table = batch.block_tables + row * batch.table_length;
    for (int64_t i = 0; i * pool.block_size < length; i++) {
        require(table[i] >= 0 && table[i] < pool.num_blocks, "a block of row", row, table[i]);
    }
}

}  // namespace

void check_batch(const Batch& batch, const Pool& pool, int64_t vocab_size) {
    require(batch.starts[0] == 0, "the start of row", 0, batch.starts[0]);
    for (int64_t row = 0; row < batch.num_rows; row++) check_row(batch, pool, row);
    const int64_t end = batch.starts[batch.num_rows];
    require(end == batch.num_tokens, "the end of row", batch.num_rows - 1, end);
    for (int64_t i = 0; i < batch.num_tokens; i++) {
        require(batch.tokens[i] >= 0 && batch.tokens[i] < vocab_size, "token", i, batch.tokens[i]);
    }
    for (int64_t i = 0; i < batch.num_sampled; i++) {
        require(batch.sampled[i] >= 0 && batch.sampled[i] < batch.num_tokens, "sampled token", i, batch.sampled[i]);
    }
}

}  // namespace tandem
