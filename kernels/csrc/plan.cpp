#include "plan.h"

#include <algorithm>

#include "kernels.h"

namespace tandem {
namespace {

constexpr int64_t part_keys = 512;  // a multiple of key_step

// By its length alone: a token's numbers are the same whatever else is in the batch, and on any number of threads.
int64_t parts_of(int64_t num_keys) { return (num_keys + part_keys - 1) / part_keys; }

void add_pieces(std::vector<Piece>& pieces, const Batch& batch, int64_t row, int64_t kv_head, int64_t tokens,
                int64_t num_parts) {
    const int64_t start = batch.starts[row], count = batch.starts[row + 1] - start;
    const int64_t before = batch.lengths[row] - count;
    for (int64_t first = 0; first < count; first += tokens) {
        const int64_t some = std::min(tokens, count - first);
        const int64_t cost = (before + first + some) / num_parts * some;
        for (int64_t part = 0; part < num_parts; part++) {
            pieces.push_back({row, kv_head, start + first, some, before + first, part, num_parts, cost});
        }
    }
}

std::vector<Piece> cut(const Batch& batch, int64_t num_kv_heads, int64_t share) {
    std::vector<Piece> pieces;
    for (int64_t row = 0; row < batch.num_rows; row++) {
        const bool one_token = batch.starts[row + 1] - batch.starts[row] == 1;
        const int64_t num_parts = one_token ? parts_of(batch.lengths[row]) : 1;
        for (int64_t head = 0; head < num_kv_heads; head++) {
            add_pieces(pieces, batch, row, head, piece_tokens(share), num_parts);
        }
    }
    std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.cost > b.cost; });
    return pieces;
}

// Of each piece that is in parts, the first.
std::vector<Piece> first_parts(const std::vector<Piece>& pieces) {
    std::vector<Piece> found;
    for (const Piece& piece : pieces) {
        if (piece.num_parts > 1 && piece.part == 0) found.push_back(piece);
    }
    return found;
}

// Rows may follow one another in one sequence, with a token each: the next row sees the block that this one writes to.
bool next_sees(const Batch& batch, int64_t row, int64_t block_size) {
    const int64_t written = (batch.lengths[row] - 1) / block_size;
    return batch.blocks(row)[written] == batch.blocks(row + 1)[written];
}

bool stand_alone(const Batch& batch, int64_t block_size) {
    if (batch.num_tokens > batch.num_rows) return false;
    for (int64_t row = 0; row + 1 < batch.num_rows; row++) {
        if (next_sees(batch, row, block_size)) return false;
    }
    return true;
}

char* head_of(const HeadRows& rows, int64_t token, int64_t head, int64_t head_dim) {
    return rows.items + (token * rows.stride + head * head_dim) * static_cast<int64_t>(item_bytes(rows.kind));
}

}  // namespace

AttentionPlan::AttentionPlan(const Batch& batch, const Pool& pool, int64_t num_heads)
    : batch_(batch),
      pool_(pool),
      share_(num_heads / pool.num_kv_heads),
      pieces_(cut(batch, pool.num_kv_heads, share_)),
      merges_(first_parts(pieces_)),
      each_alone_(merges_.empty() && stand_alone(batch, pool.block_size)),
      positions_(batch.num_tokens),
      row_of_token_(batch.num_tokens) {
    for (int64_t row = 0; row < batch.num_rows; row++) {
        for (int64_t token = batch.starts[row]; token < batch.starts[row + 1]; token++) {
            positions_[token] = batch.lengths[row] - (batch.starts[row + 1] - token);
            row_of_token_[token] = row;
        }
    }
    for (const Piece& piece : merges_) most_parts_ = std::max(most_parts_, piece.num_parts);
}

// Each head of each row has room for as many parts as the longest row needs.
int64_t AttentionPlan::part_floats() const {
    if (merges_.empty()) return 0;
    return batch_.num_rows * pool_.num_kv_heads * most_parts_ * share_ * (2 + pool_.head_dim);
}

int64_t AttentionPlan::part_offset(const Piece& piece) const {
    const int64_t place = (piece.row * pool_.num_kv_heads + piece.kv_head) * most_parts_ + piece.part;
    return place * share_ * (2 + pool_.head_dim);
}

char* AttentionPlan::place(int64_t token, int64_t layer, int64_t kv_head) const {
    const int64_t position = positions_[token];
    const int64_t block = batch_.blocks(row_of_token_[token])[position / pool_.block_size];
    return pool_.keys(layer, kv_head) + block * pool_.block_bytes() + position % pool_.block_size * pool_.row_bytes();
}

void AttentionPlan::attend(const Piece& piece, int64_t layer, const ScoreRule& rule, const HeadRows& queries,
                           const HeadRows& output, float* parts, char* scratch) const {
    const int64_t end = piece.first_position + piece.num_tokens;
    const int64_t part_length = rounded_up((end + piece.num_parts - 1) / piece.num_parts, key_step);
    const int64_t seen_from = rule.window > 0 ? std::max<int64_t>(piece.first_position + 1 - rule.window, 0) : 0;
    const int64_t first_key = std::max(seen_from / key_step * key_step, piece.part * part_length);
    const int64_t head = piece.kv_head * share_;
    const char* const first_query = head_of(queries, piece.first_token, head, pool_.head_dim);
    kernels().attend(shape(rule, queries, output),
                     {reinterpret_cast<const float*>(first_query),
                      head_of(output, piece.first_token, head, pool_.head_dim), pool_.keys(layer, piece.kv_head),
                      batch_.blocks(piece.row), piece.first_position, piece.num_tokens, first_key,
                      std::min(end, (piece.part + 1) * part_length),
                      piece.num_parts > 1 ? parts + part_offset(piece) : nullptr},
                     scratch);
}

void AttentionPlan::merge(const Piece& piece, const HeadRows& output, const float* parts) const {
    merge_parts(shape({}, {}, output), parts + part_offset(piece), piece.num_parts,
                head_of(output, piece.first_token, piece.kv_head * share_, pool_.head_dim));
}

AttentionShape AttentionPlan::shape(const ScoreRule& rule, const HeadRows& queries, const HeadRows& output) const {
    return {pool_.head_dim,   share_,         pool_.block_size, pool_.block_bytes(), pool_.side_bytes(), pool_.kind,
            queries.stride, output.kind, output.stride, rule.scale, rule.soft_cap, rule.window};
}

}  // namespace tandem
