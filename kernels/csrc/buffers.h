// What a forward writes besides the pool: grown when a batch is larger than any before, and kept.
#pragma once

#include "attention.h"
#include "decoder.h"
#include "memory.h"

namespace tandem {

// Rows of activations. Each is zero from its last column to the end of a panel, and there are rows up to a whole block.
struct Rows {
    char* items = nullptr;
    int64_t row_bytes = 0;

    char* row(int64_t index) const { return items + index * row_bytes; }
    float* floats(int64_t index) const { return reinterpret_cast<float*>(row(index)); }
    int64_t stride(Kind kind) const { return row_bytes / static_cast<int64_t>(item_bytes(kind)); }
    Input input() const { return {items, row_bytes}; }
};

struct Buffers {
    Rows stream;    // float32 [tokens, hidden]
    Rows normed;    // [tokens, hidden], the products' input kind, as are `attended` and `inner`
    Rows qkv;       // float32 [tokens, query, key and value heads × head_dim]
    Rows attended;  // [tokens, query heads × head_dim]
    Rows inner;     // [tokens, intermediate]
    Rows turns;     // float32 [tokens, cosines then sines]
    Rows sampled;   // [sampled tokens, hidden]
    Rows logits;    // float32 [sampled tokens, vocabulary]
    float* parts = nullptr;    // of attention
    char* scratch = nullptr;   // [threads][scratch_bytes]
    int64_t scratch_bytes = 0;

    void fit(const DecoderShape& shape, Kind kind, const Batch& batch, int64_t part_floats);

   private:
    void fit_tokens(const DecoderShape& shape, Kind kind, int64_t num_tokens);
    void fit_sampled(const DecoderShape& shape, Kind kind, int64_t num_sampled);
    void fit_parts(int64_t part_floats);
    void fit_scratch(int64_t bytes, int num_threads);

    int64_t num_tokens_ = 0, num_sampled_ = 0;
    Memory token_memory_, sampled_memory_, part_memory_, scratch_memory_;
};

}  // namespace tandem
