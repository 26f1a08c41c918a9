// Attention of some query tokens of one sequence over its cached keys and values.
//
// The query heads that share a key-value head are computed together, so that each key is read once for all of them. The
// softmax runs online (arXiv:1805.02867) over steps of keys whose borders lie at fixed positions of the sequence: how a
// prompt was cut into chunks moves no border.
//
//     keys of the sequence   |0 . . . . . . 63|64 . . . . . 127|128 . .
//     a piece of queries                            first_query ^ . . . ^ first_query + num_queries
#pragma once

#include "pool.h"

namespace tandem {

// What all pieces of a layer have in common.
struct AttentionShape {
    int64_t head_dim;
    int64_t share;       // query heads to a key-value head
    int64_t block_size;  // tokens
    int64_t block_bytes;
    int64_t side_bytes;
    Kind pool_kind;
    int64_t query_stride;  // floats from token to token
    Kind output_kind;
    int64_t output_stride;  // items from token to token
    float scale;            // on the scores
    float soft_cap;         // 0: none
    int64_t window;         // tokens back that a token sees, itself included; 0: all
};

// One sequence, one key-value head, some of its new tokens, and the keys [first_key, end_key) in so far as each token
// sees them.
struct AttentionPiece {
    const float* queries;    // the piece's first token, first head of the share: [tokens][share][head_dim]
    void* output;            // as the queries
    const char* keys;        // of the head, in block 0
    const int64_t* blocks;   // of the sequence, in token order
    int64_t first_query;     // position in the sequence
    int64_t num_queries;     // tokens
    int64_t first_key;       // a multiple of key_step
    int64_t end_key;
    // Null, or where instead of the output go [share] × (largest score, sum of weights, [head_dim] weighted values): a
    // part of one token's attention, to be merged with others.
    float* part;
};

constexpr int64_t key_step = 64;
constexpr int64_t most_piece_rows = 192;  // tokens × share

inline int64_t piece_tokens(int64_t share) { return share >= most_piece_rows ? 1 : most_piece_rows / share; }

// Of a thread, for any piece of that shape.
int64_t attention_scratch_bytes(const AttentionShape& shape);

// Merges the parts of one token into its output, [share][head_dim].
void merge_parts(const AttentionShape& shape, const float* parts, int64_t num_parts, void* output);

}  // namespace tandem
