#include "batch.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace tandem {
namespace {

constexpr int64_t part_keys = 512;  // a multiple of key_step

void require(bool holds, const char* what, int64_t index, int64_t value) {
    if (holds) return;
    throw std::out_of_range(std::string(what) + " " + std::to_string(index) + " is out of range: " +
                            std::to_string(value));
}

void check_row(const DecoderBatch& batch, const Pool& pool, int64_t row) {
    const int64_t count = batch.starts[row + 1] - batch.starts[row], length = batch.lengths[row];
    require(count > 0, "the number of tokens of row", row, count);
    require(length >= count && length <= batch.table_length * pool.block_size, "the length of row", row, length);
    const int64_t* const table = batch.block_tables + row * batch.table_length;
    for (int64_t i = 0; i * pool.block_size < length; i++) {
        require(table[i] >= 0 && table[i] < pool.num_blocks, "a block of row", row, table[i]);
    }
}

// Only a batch too small to keep the threads busy is worth the merging.
int64_t parts_of(const DecoderBatch& batch, int64_t row, int64_t num_kv_heads, int num_threads) {
    const int64_t wanted = 4 * num_threads;
    if (num_threads == 1 || batch.num_rows * num_kv_heads >= wanted) return 1;
    return (batch.lengths[row] + part_keys - 1) / part_keys;
}

void add_pieces(std::vector<Piece>& pieces, const DecoderBatch& batch, int64_t row, int64_t kv_head, int64_t tokens,
                int64_t num_parts) {
    const int64_t start = batch.starts[row], count = batch.starts[row + 1] - start;
    const int64_t before = batch.lengths[row] - count;
    for (int64_t first = 0; first < count; first += tokens) {
        const int64_t some = std::min(tokens, count - first);
        const int64_t cost = (before + first + some) / num_parts * some;
        for (int64_t part = 0; part < num_parts; part++) {
            pieces.push_back({row, kv_head, start + first, some, before + first, part, num_parts, cost});
        }
    }
}

}  // namespace

void check_batch(const DecoderBatch& batch, const Pool& pool, int64_t vocab_size) {
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

std::vector<Piece> attention_pieces(const DecoderBatch& batch, int64_t num_kv_heads, int64_t share, int num_threads) {
    std::vector<Piece> pieces;
    for (int64_t row = 0; row < batch.num_rows; row++) {
        const bool one_token = batch.starts[row + 1] - batch.starts[row] == 1;
        const int64_t num_parts = one_token ? parts_of(batch, row, num_kv_heads, num_threads) : 1;
        for (int64_t head = 0; head < num_kv_heads; head++) {
            add_pieces(pieces, batch, row, head, piece_tokens(share), num_parts);
        }
    }
    std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.cost > b.cost; });
    return pieces;
}

}  // namespace tandem
