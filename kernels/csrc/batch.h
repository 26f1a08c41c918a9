// A checked batch, and how its attention is cut into pieces of work.
#pragma once

#include <vector>

#include "decoder.h"

namespace tandem {

// Throws std::out_of_range when the batch points outside the pool, the vocabulary or itself.
void check_batch(const DecoderBatch& batch, const Pool& pool, int64_t vocab_size);

// Tokens [first_token, first_token + num_tokens) of the batch, of one row, with one key-value head; of one token with a
// long context perhaps a part of the keys only.
struct Piece {
    int64_t row;
    int64_t kv_head;
    int64_t first_token;
    int64_t num_tokens;
    int64_t first_position;
    int64_t part;       // which of num_parts
    int64_t num_parts;  // of the token's keys
    int64_t cost;       // keys times queries, about
};

// The longest first, so that no thread begins a long one when the others are done.
std::vector<Piece> attention_pieces(const DecoderBatch& batch, int64_t num_kv_heads, int64_t share, int num_threads);

}  // namespace tandem
