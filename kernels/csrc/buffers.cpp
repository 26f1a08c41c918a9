#include "buffers.h"

#include <vector>

#include "threads.h"

namespace tandem {
namespace {

constexpr int64_t line_bytes = 64;
constexpr int64_t row_pad_bytes = line_bytes;  // so that the rows of a tile do not all fall into one set of the cache

struct Wish {
    Rows* rows;
    int64_t columns;
    Kind kind;
};

int64_t row_bytes(const Wish& wish) {
    const int64_t bytes = rounded_up(wish.columns, panel_columns) * static_cast<int64_t>(item_bytes(wish.kind));
    return rounded_up(bytes, line_bytes) + row_pad_bytes;
}

Memory allocate(const std::vector<Wish>& wishes, int64_t num_rows) {
    int64_t total = 0;
    for (const Wish& wish : wishes) total += row_bytes(wish) * num_rows;
    Memory memory(total);
    char* next = memory.data();
    for (const Wish& wish : wishes) {
        *wish.rows = {next, row_bytes(wish)};
        next += row_bytes(wish) * num_rows;
    }
    return memory;
}

}  // namespace

void Buffers::fit(const DecoderShape& shape, Kind kind, const Batch& batch, int64_t part_floats) {
    fit_tokens(shape, kind, rounded_up(batch.num_tokens, block_rows));
    fit_sampled(shape, kind, rounded_up(batch.num_sampled, block_rows));
    fit_parts(part_floats);
    AttentionShape attention = {};
    attention.head_dim = shape.head_dim;
    attention.share = shape.num_heads / shape.num_kv_heads;
    fit_scratch(attention_scratch_bytes(attention), Threads::shared().size());
}

void Buffers::fit_tokens(const DecoderShape& shape, Kind kind, int64_t num_tokens) {
    if (num_tokens <= num_tokens_) return;
    const int64_t heads = shape.num_heads + 2 * shape.num_kv_heads;
    token_memory_ = Memory();  // the old goes before the new comes
    token_memory_ = allocate({{&stream, shape.hidden_size, Kind::float32},
                              {&normed, shape.hidden_size, kind},
                              {&qkv, heads * shape.head_dim, Kind::float32},
                              {&attended, shape.num_heads * shape.head_dim, kind},
                              {&inner, shape.intermediate_size, kind},
                              {&turns, shape.head_dim, Kind::float32}},
                             num_tokens);
    num_tokens_ = num_tokens;
}

void Buffers::fit_sampled(const DecoderShape& shape, Kind kind, int64_t num_sampled) {
    if (num_sampled <= num_sampled_) return;
    sampled_memory_ = Memory();
    sampled_memory_ =
        allocate({{&sampled, shape.hidden_size, kind}, {&logits, shape.vocab_size, Kind::float32}}, num_sampled);
    num_sampled_ = num_sampled;
}

void Buffers::fit_parts(int64_t part_floats) {
    const size_t bytes = part_floats * sizeof(float);
    if (bytes > part_memory_.size()) part_memory_ = Memory(bytes);
    parts = reinterpret_cast<float*>(part_memory_.data());
}

void Buffers::fit_scratch(int64_t bytes, int num_threads) {
    if (static_cast<size_t>(bytes * num_threads) > scratch_memory_.size()) scratch_memory_ = Memory(bytes * num_threads);
    scratch = scratch_memory_.data();
    scratch_bytes = bytes;
}

}  // namespace tandem
