// Asks for the tokens of a sequence's cache one by one, while others are computed: all at once they would keep the
// processor from anything else until the last had come.
#pragma once

#include "attention.h"

namespace tandem::TANDEM_ISA_NAMESPACE {

// Of a bfloat16 cache whose blocks hold a power of two of tokens; the value lies `side_bytes` further.
inline const char* cached_key(const AttentionShape& shape, const AttentionPiece& piece, int64_t token) {
    const int64_t row_bytes = shape.head_dim * static_cast<int64_t>(sizeof(BFloat16));
    const int64_t block = piece.blocks[token >> __builtin_ctzll(shape.block_size)];
    return piece.keys + block * shape.block_bytes + (token & (shape.block_size - 1)) * row_bytes;
}

class CacheAhead {
   public:
    CacheAhead(const AttentionShape& shape, const AttentionPiece& piece) : shape_(shape), piece_(piece) {}

    // The next to ask for are these, up to the piece's end.
    void look_at(int64_t first_token) {
        next_ = first_token;
        end_ = first_token + key_step < piece_.end_key ? first_token + key_step : piece_.end_key;
    }

    void ask_for(int64_t num_tokens) {
        for (; num_tokens > 0 && next_ < end_; num_tokens--, next_++) {
            constexpr int64_t line_bytes = 64;
            const int64_t row_bytes = shape_.head_dim * static_cast<int64_t>(sizeof(BFloat16));
            const char* const key = cached_key(shape_, piece_, next_);
            for (int64_t byte = 0; byte < row_bytes; byte += line_bytes) {
                __builtin_prefetch(key + byte);
                __builtin_prefetch(key + shape_.side_bytes + byte);
            }
        }
    }

   private:
    const AttentionShape& shape_;
    const AttentionPiece& piece_;
    int64_t next_ = 0, end_ = 0;
};

}  // namespace tandem::TANDEM_ISA_NAMESPACE
