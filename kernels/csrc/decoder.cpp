#include "decoder.h"

#include <stdexcept>
#include <string>

#include "buffers.h"
#include "pass.h"

namespace tandem {
namespace {

constexpr int64_t most_head_dim = 512;

void require(bool holds, const std::string& message) {
    if (!holds) throw std::invalid_argument(message);
}

void check_weight(const Weight& weight, const char* name, int64_t rows, int64_t columns, Kind kind) {
    require(weight != nullptr, std::string(name) + " is missing");
    require(weight->rows() == rows && weight->columns() == columns,
            std::string(name) + " is not [" + std::to_string(rows) + ", " + std::to_string(columns) + "]");
    require(weight->input_kind() == kind, std::string(name) + " is of another kind than the output head");
}

enum class Need { always, optional };

void check_vector(const Vector& vector, const char* name, int64_t size, Need need) {
    if (vector.empty() && need == Need::optional) return;
    require(static_cast<int64_t>(vector.size()) == size, std::string(name) + " is not [" + std::to_string(size) + "]");
}

void check_shape(const DecoderShape& shape, int64_t num_layers) {
    require(shape.num_kv_heads > 0 && shape.num_heads % shape.num_kv_heads == 0, "heads cannot be shared evenly");
    require(shape.head_dim % 2 == 0 && shape.head_dim > 0 && shape.head_dim <= most_head_dim,
            "head_dim is odd, or above " + std::to_string(most_head_dim));
    require(shape.num_heads / shape.num_kv_heads <= most_piece_rows, "too many heads share their keys and values");
    check_vector(shape.frequencies, "frequencies", shape.head_dim / 2, Need::always);
    require(static_cast<int64_t>(shape.windows.size()) == num_layers, "there is not one window for each layer");
}

void check_layer(const DecoderLayer& layer, const DecoderShape& shape, Kind kind) {
    const int64_t attended = shape.num_heads * shape.head_dim;
    const int64_t qkv = attended + 2 * shape.num_kv_heads * shape.head_dim;
    check_weight(layer.qkv, "qkv", qkv, shape.hidden_size, kind);
    check_weight(layer.output, "output", shape.hidden_size, attended, kind);
    check_weight(layer.gate_up, "gate_up", 2 * shape.intermediate_size, shape.hidden_size, kind);
    check_weight(layer.down, "down", shape.hidden_size, shape.intermediate_size, kind);
    require(layer.gate_up->gated() && !layer.qkv->gated() && !layer.output->gated() && !layer.down->gated(),
            "gate_up, and nothing else, is to be packed as gated");
    check_vector(layer.attention_norm, "attention_norm", shape.hidden_size, Need::always);
    check_vector(layer.mlp_norm, "mlp_norm", shape.hidden_size, Need::always);
    check_vector(layer.query_norm, "query_norm", shape.head_dim, Need::optional);
    check_vector(layer.key_norm, "key_norm", shape.head_dim, Need::optional);
    check_vector(layer.qkv_bias, "qkv_bias", qkv, Need::optional);
    check_vector(layer.output_bias, "output_bias", shape.hidden_size, Need::optional);
    check_vector(layer.gate_up_bias, "gate_up_bias", 2 * shape.intermediate_size, Need::optional);
    check_vector(layer.down_bias, "down_bias", shape.hidden_size, Need::optional);
}

// A bias for every column of every panel, as the products find them.
void deal(Vector& bias, const PackedWeight& weight) {
    if (bias.empty()) return;
    Vector columns(weight.num_panels() * panel_columns, 0.0f);
    for (int64_t i = 0; i < static_cast<int64_t>(columns.size()); i++) {
        const int64_t row = weight.row_of(i / panel_columns, i % panel_columns);
        if (row >= 0) columns[i] = bias[row];
    }
    bias = columns;
}

DecoderModel checked(DecoderModel model) {
    require(model.head != nullptr, "the output head is missing");
    const Kind kind = model.head->input_kind();
    check_shape(model.shape, model.num_layers());
    check_weight(model.head, "head", model.shape.vocab_size, model.shape.hidden_size, kind);
    check_weight(model.embedding, "embedding", model.shape.vocab_size, model.shape.hidden_size, kind);
    check_vector(model.norm, "norm", model.shape.hidden_size, Need::always);
    for (DecoderLayer& layer : model.layers) {
        check_layer(layer, model.shape, kind);
        deal(layer.qkv_bias, *layer.qkv);
        deal(layer.output_bias, *layer.output);
        deal(layer.gate_up_bias, *layer.gate_up);
        deal(layer.down_bias, *layer.down);
    }
    return model;
}

void check_pool(const Pool& pool, const DecoderModel& model) {
    require(pool.num_layers == model.num_layers() && pool.num_kv_heads == model.shape.num_kv_heads &&
                pool.head_dim == model.shape.head_dim && pool.block_size > 0,
            "the pool has another shape than the model");
}

}  // namespace

Decoder::Decoder(DecoderModel model) : model_(checked(std::move(model))), buffers_(new Buffers) {}

Decoder::~Decoder() = default;

Logits Decoder::forward(const Batch& batch, const Pool& pool) {
    check_pool(pool, model_);
    check_batch(batch, pool, model_.shape.vocab_size);
    Pass(model_, batch, pool, *buffers_).run();
    return {buffers_->logits.floats(0), buffers_->logits.stride(Kind::float32)};
}

int64_t Decoder::num_bytes() const {
    int64_t total = model_.embedding->num_bytes() + (model_.head == model_.embedding ? 0 : model_.head->num_bytes());
    for (const DecoderLayer& layer : model_.layers) {
        for (const Weight* weight : {&layer.qkv, &layer.output, &layer.gate_up, &layer.down}) {
            total += (*weight)->num_bytes();
        }
    }
    return total;
}

}  // namespace tandem
