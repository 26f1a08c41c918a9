// Asks for the tokens of a sequence's cache one by one, while others are computed: all at once they would keep the
// processor from anything else until the last had come.
#pragma once

#include "attention.h"

namespace tandem::TANDEM_ISA_NAMESPACE {

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
            const int64_t block = piece_.blocks[next_ >> __builtin_ctzll(shape_.block_size)];
            const char* const key =
                piece_.keys + block * shape_.block_bytes + (next_ & (shape_.block_size - 1)) * row_bytes;
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
