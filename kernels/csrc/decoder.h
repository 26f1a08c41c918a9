// A whole decoder over a ragged batch, in one call: pre-norm layers of attention and gated MLP, keys and values in a
// paged pool. The residual stream is float32; products take their inputs rounded to the weights' kind.
#pragma once

#include <memory>
#include <vector>

#include "batch.h"
#include "pool.h"
#include "weight.h"

namespace tandem {

struct DecoderShape {
    int64_t hidden_size;
    int64_t intermediate_size;
    int64_t num_heads;
    int64_t num_kv_heads;
    int64_t head_dim;
    int64_t vocab_size;
    float epsilon;         // of the norms
    float score_scale;     // 1 / sqrt(head_dim), mostly
    float score_soft_cap;  // 0: none
    float logit_soft_cap;  // 0: none
    float embedding_scale;
    float rotary_scale;              // cos and sin are multiplied by it
    std::vector<float> frequencies;  // [head_dim / 2], radians per token
    std::vector<int64_t> windows;    // per layer, tokens back that a token sees, itself included; 0: all
};

using Vector = std::vector<float>;  // empty where a model has none
using Weight = std::shared_ptr<const PackedWeight>;

struct DecoderLayer {
    Vector attention_norm, query_norm, key_norm, mlp_norm;
    Weight qkv, output, gate_up, down;  // qkv: query heads, key heads, value heads
    Vector qkv_bias, output_bias, gate_up_bias, down_bias;
};

struct DecoderModel {
    DecoderShape shape;
    Weight embedding;
    std::vector<DecoderLayer> layers;
    Vector norm;
    Weight head;  // may be the embedding itself

    int64_t num_layers() const { return static_cast<int64_t>(layers.size()); }
    Kind input_kind() const { return head->input_kind(); }
};

struct Logits {
    float* items;    // [num_sampled, vocab_size], rows `stride` apart
    int64_t stride;  // floats
};

struct Buffers;

class Decoder {
   public:
    // Throws std::invalid_argument where sizes do not fit together.
    explicit Decoder(DecoderModel model);
    ~Decoder();

    // Stores the batch's keys and values in the pool. The logits stay valid until the next call. Throws
    // std::out_of_range, having done nothing, when an index lies outside what it points into, and
    // std::invalid_argument for a pool of another shape than the model's. One call at a time.
    Logits forward(const Batch& batch, const Pool& pool);

    const DecoderShape& shape() const { return model_.shape; }
    int64_t num_bytes() const;  // of weights

   private:
    const DecoderModel model_;
    const std::unique_ptr<Buffers> buffers_;
};

}  // namespace tandem
