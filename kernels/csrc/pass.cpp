#include "pass.h"

#include <algorithm>
#include <cmath>

#include "threads.h"

namespace tandem {
namespace {

constexpr int64_t input_bytes_at_once = 1 << 20;  // half of a core's second-level cache
constexpr int64_t bytes_ahead = 256 << 10;  // of weights: an eighth of that cache
constexpr int64_t tokens_at_once = 8;
constexpr int64_t tokens_alone = 8;  // normalised by one thread in less time than a meeting takes

const float* pointer(const Vector& vector) { return vector.empty() ? nullptr : vector.data(); }

}  // namespace

Pass::Pass(const DecoderModel& model, const Batch& batch, const Pool& pool, Buffers& buffers)
    : model_(model),
      shape_(model.shape),
      batch_(batch),
      pool_(pool),
      buffers_(buffers),
      kernels_(kernels()),
      kind_(model.input_kind()),
      plan_(batch, pool, shape_.num_heads) {
    buffers_.fit(shape_, kind_, batch, plan_.part_floats());
}

void Pass::run() {
    Threads::shared().run([this](Team& team, int member) {
        kernels_.enter();
        work(team, member);
        kernels_.leave();
    });
}

void Pass::work(Team& team, int member) {
    each_token(team, member, [this](int64_t token) { start_token(token); });
    for (int64_t layer = 0; layer < model_.num_layers(); layer++) run_layer(team, member, layer);
    if (batch_.num_sampled == 0) return;
    multiply(team, member, head_product(), [this] { normalise_sampled(); });
    if (shape_.logit_soft_cap == 0) return;
    team.each(member, batch_.num_sampled, [this](int64_t row) { cap_logits(row); });
}

void Pass::run_layer(Team& team, int member, int64_t layer) {
    const DecoderLayer& weights = model_.layers[layer];
    normalise_then_multiply(team, member, weights.attention_norm, qkv_product(layer));
    // Of a prompt's chunk that is not its last, nothing but keys and values is wanted.
    if (layer + 1 == model_.num_layers() && batch_.num_sampled == 0) return prepare_all(team, member, layer);
    run_attention(team, member, layer);
    multiply(team, member, output_product(layer));
    normalise_then_multiply(team, member, weights.mlp_norm, gate_up_product(layer));
    multiply(team, member, down_product(layer));
}

void Pass::multiply(Team& team, int member, const Product& product) {
    multiply(team, member, product, [] {});
}

template <class Alone>
void Pass::multiply(Team& team, int member, const Product& product, Alone alone) {
    if (!team.meet(member, product.num_pieces(), alone, product.ahead(member, team.size()))) return;
    const Product prepared = product.prepared();
    team.each_left(member, [&](int64_t piece) { prepared.run(piece); });
}

void Pass::run_attention(Team& team, int member, int64_t layer) {
    if (!plan_.each_alone()) prepare_all(team, member, layer);
    team.each(member, static_cast<int64_t>(plan_.pieces().size()),
              [&](int64_t piece) { attend(layer, plan_.pieces()[piece], member); });
    if (plan_.merges().empty()) return;
    team.each(member, static_cast<int64_t>(plan_.merges().size()),
              [this](int64_t piece) { plan_.merge(plan_.merges()[piece], attended(), buffers_.parts); });
}

void Pass::prepare_all(Team& team, int member, int64_t layer) {
    each_token(team, member, [&](int64_t token) {
        for (int64_t head = 0; head < shape_.num_kv_heads; head++) prepare(layer, token, head);
    });
}

int64_t Pass::num_token_groups() const { return (batch_.num_tokens + tokens_at_once - 1) / tokens_at_once; }

template <class Function>
void Pass::each_token(Team& team, int member, Function function) {
    team.each(member, num_token_groups(), [&](int64_t group) {
        const int64_t end = std::min((group + 1) * tokens_at_once, batch_.num_tokens);
        for (int64_t token = group * tokens_at_once; token < end; token++) function(token);
    });
}

void Pass::start_token(int64_t token) {
    float* const stream = buffers_.stream.floats(token);
    model_.embedding->row(batch_.tokens[token], stream);
    if (shape_.embedding_scale != 1) {
        for (int64_t i = 0; i < shape_.hidden_size; i++) stream[i] *= shape_.embedding_scale;
    }
    const int64_t half = shape_.head_dim / 2;
    float* const turns = buffers_.turns.floats(token);
    for (int64_t i = 0; i < half; i++) {
        const float angle = static_cast<float>(plan_.position(token)) * shape_.frequencies[i];
        turns[i] = std::cos(angle) * shape_.rotary_scale;
        turns[half + i] = std::sin(angle) * shape_.rotary_scale;
    }
}

void Pass::normalise_then_multiply(Team& team, int member, const Vector& norm, const Product& product) {
    if (batch_.num_tokens > tokens_alone) {
        each_token(team, member, [&](int64_t token) { normalise(norm, token); });
        return multiply(team, member, product);
    }
    multiply(team, member, product, [&] {
        for (int64_t token = 0; token < batch_.num_tokens; token++) normalise(norm, token);
    });
}

void Pass::normalise(const Vector& norm, int64_t token) {
    kernels_.normalise(buffers_.stream.floats(token), norm.data(), shape_.hidden_size, shape_.epsilon, kind_,
                       buffers_.normed.row(token));
}

void Pass::normalise_sampled() {
    for (int64_t i = 0; i < batch_.num_sampled; i++) {
        kernels_.normalise(buffers_.stream.floats(batch_.sampled[i]), model_.norm.data(), shape_.hidden_size,
                           shape_.epsilon, kind_, buffers_.sampled.row(i));
    }
}

// Norms and turns the heads of one share, and stores its keys and values.
void Pass::prepare(int64_t layer, int64_t token, int64_t kv_head) {
    const DecoderLayer& weights = model_.layers[layer];
    const int64_t share = shape_.num_heads / shape_.num_kv_heads;
    for (int64_t i = 0; i < share; i++) turn_head(weights.query_norm, token, head_of(token, kv_head * share + i));
    float* const key = head_of(token, shape_.num_heads + kv_head);
    turn_head(weights.key_norm, token, key);
    char* const place = plan_.place(token, layer, kv_head);
    kernels_.narrow(key, shape_.head_dim, pool_.kind, place);
    const float* const value = head_of(token, shape_.num_heads + shape_.num_kv_heads + kv_head);
    kernels_.narrow(value, shape_.head_dim, pool_.kind, place + pool_.side_bytes());
}

void Pass::turn_head(const Vector& norm, int64_t token, float* head) {
    if (!norm.empty()) {
        kernels_.normalise(head, norm.data(), shape_.head_dim, shape_.epsilon, Kind::float32, head);
    }
    const float* const turns = buffers_.turns.floats(token);
    const int64_t half = shape_.head_dim / 2;
    kernels_.turn({turns, turns + half, half}, head);
}

void Pass::attend(int64_t layer, const Piece& piece, int member) {
    if (plan_.each_alone()) prepare(layer, piece.first_token, piece.kv_head);
    plan_.attend(piece, layer, {shape_.score_scale, shape_.score_soft_cap, shape_.windows[layer]}, queries(),
                 attended(), buffers_.parts, buffers_.scratch + member * buffers_.scratch_bytes);
}

void Pass::cap_logits(int64_t row) {
    float* const logits = buffers_.logits.floats(row);
    for (int64_t i = 0; i < shape_.vocab_size; i++) {
        logits[i] = std::tanh(logits[i] / shape_.logit_soft_cap) * shape_.logit_soft_cap;
    }
}

HeadRows Pass::queries() const {
    return {buffers_.qkv.items, Kind::float32, buffers_.qkv.stride(Kind::float32)};
}

HeadRows Pass::attended() const { return {buffers_.attended.items, kind_, buffers_.attended.stride(kind_)}; }

float* Pass::head_of(int64_t token, int64_t head) const {
    return buffers_.qkv.floats(token) + head * shape_.head_dim;
}

Pass::Product Pass::qkv_product(int64_t layer) const {
    const DecoderLayer& weights = model_.layers[layer];
    const Output output = {Finish::store, Kind::float32, buffers_.qkv.items, buffers_.qkv.stride(Kind::float32),
                           pointer(weights.qkv_bias)};
    return {*weights.qkv, buffers_.normed.input(), batch_.num_tokens, output};
}

Pass::Product Pass::output_product(int64_t layer) const {
    const DecoderLayer& weights = model_.layers[layer];
    const Output output = {Finish::add, Kind::float32, buffers_.stream.items, buffers_.stream.stride(Kind::float32),
                           pointer(weights.output_bias)};
    return {*weights.output, buffers_.attended.input(), batch_.num_tokens, output};
}

Pass::Product Pass::gate_up_product(int64_t layer) const {
    const DecoderLayer& weights = model_.layers[layer];
    const Output output = {Finish::gate, kind_, buffers_.inner.items, buffers_.inner.stride(kind_),
                           pointer(weights.gate_up_bias)};
    return {*weights.gate_up, buffers_.normed.input(), batch_.num_tokens, output};
}

Pass::Product Pass::down_product(int64_t layer) const {
    const DecoderLayer& weights = model_.layers[layer];
    const Output output = {Finish::add, Kind::float32, buffers_.stream.items, buffers_.stream.stride(Kind::float32),
                           pointer(weights.down_bias)};
    return {*weights.down, buffers_.inner.input(), batch_.num_tokens, output};
}

Pass::Product Pass::head_product() const {
    const Output output = {Finish::store, Kind::float32, buffers_.logits.items, buffers_.logits.stride(Kind::float32),
                           nullptr};
    return {*model_.head, buffers_.sampled.input(), batch_.num_sampled, output};
}

Pass::Product Pass::Product::prepared() const { return {weight, weight.prepared(input, num_rows), num_rows, output}; }

int64_t Pass::Product::rows_at_once() const {
    return std::max(block_rows, input_bytes_at_once / input.row_bytes / block_rows * block_rows);
}

int64_t Pass::Product::num_pieces() const {
    return (num_rows + rows_at_once() - 1) / rows_at_once() * weight.num_panels();
}

void Pass::Product::run(int64_t piece) const {
    const int64_t first = piece / weight.num_panels() * rows_at_once();
    weight.multiply(input, first, std::min(rows_at_once(), num_rows - first), piece % weight.num_panels(), output);
}

WeightsAhead Pass::Product::ahead(int member, int num_members) const {
    const int64_t first = num_pieces() * member / num_members % weight.num_panels();
    const char* const start = weight.panel_items(first);
    return {start, std::min(start + bytes_ahead, weight.panel_items(weight.num_panels()))};
}

void WeightsAhead::operator()() {
    constexpr int64_t line_bytes = 64, lines = 4;
    if (next_ >= end_) return Team::relax();
    for (int64_t i = 0; i < lines; i++) __builtin_prefetch(next_ + i * line_bytes, 0, 2);
    next_ += lines * line_bytes;
}

}  // namespace tandem
