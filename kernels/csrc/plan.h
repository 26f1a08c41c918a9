// How the attention of a batch is cut into pieces of work, for any number of layers.
#pragma once

#include <vector>

#include "attention.h"
#include "batch.h"

namespace tandem {

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

// Rows of all heads of a token.
struct HeadRows {
    char* items;
    Kind kind;
    int64_t stride;  // items from token to token
};

struct ScoreRule {
    float scale;
    float soft_cap;  // 0: none
    int64_t window;  // tokens back that a token sees, itself included; 0: all
};

class AttentionPlan {
   public:
    AttentionPlan(const Batch& batch, const Pool& pool, int64_t num_heads);

    // The longest first, so that no thread begins a long one when the others are done.
    const std::vector<Piece>& pieces() const { return pieces_; }

    // One for each piece that was cut into parts; to be merged when all are attended.
    const std::vector<Piece>& merges() const { return merges_; }

    // No piece sees anything new that it has not stored itself.
    bool each_alone() const { return each_alone_; }

    int64_t position(int64_t token) const { return positions_[token]; }
    int64_t part_floats() const;

    // Where a token's key goes; its value goes `side_bytes` further.
    char* place(int64_t token, int64_t layer, int64_t kv_head) const;

    // `queries` are float32; `scratch` is the calling thread's, of attention_scratch_bytes; `parts` has part_floats.
    void attend(const Piece& piece, int64_t layer, const ScoreRule& rule, const HeadRows& queries,
                const HeadRows& output, float* parts, char* scratch) const;
    void merge(const Piece& piece, const HeadRows& output, const float* parts) const;

   private:
    AttentionShape shape(const ScoreRule& rule, const HeadRows& queries, const HeadRows& output) const;
    int64_t part_offset(const Piece& piece) const;  // floats

    const Batch& batch_;
    const Pool& pool_;
    const int64_t share_;  // query heads to a key-value head
    std::vector<Piece> pieces_, merges_;
    const bool each_alone_;
    std::vector<int64_t> positions_, row_of_token_;
    int64_t most_parts_ = 1;
};

}  // namespace tandem
