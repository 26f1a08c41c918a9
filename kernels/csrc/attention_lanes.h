// Attention with lanes, in float32, over keys and values of any kind.
//
//     scratch   queries [rows][dims], sums [rows][dims], keys [steps × dims], values [step][dims], scores [rows][step],
//               per row the largest score so far and the sum of its weights; dims rounded up to whole lanes
#pragma once

#include "attention.h"
#include "kernels.h"
#include "rows_lanes.h"

namespace tandem::TANDEM_ISA_NAMESPACE {

constexpr int64_t few_rows = 8;  // so few that turning the keys on their side would cost more than it saves
constexpr float lowest = -1e30f;  // finite: lowest - lowest is 0, where infinities would give NaN

struct LanesAttention {
    const AttentionShape& shape;
    const AttentionPiece& piece;
    int64_t dims;  // head_dim, rounded up
    int64_t rows;
    float *queries, *sums, *keys, *values, *scores, *largest_score, *weight_sum;

    LanesAttention(const AttentionShape& shape, const AttentionPiece& piece, char* scratch)
        : shape(shape), piece(piece), dims(rounded_up(shape.head_dim, num_lanes)), rows(piece.num_queries * shape.share) {
        float* next = reinterpret_cast<float*>(scratch);
        auto part = [&](int64_t count) { return next += count, next - count; };
        queries = part(rows * dims);
        sums = part(rows * dims);
        keys = part(key_step * dims);
        values = part(key_step * dims);
        scores = part(rows * key_step);
        largest_score = part(rows);
        weight_sum = part(rows);
    }

    int64_t position(int64_t row) const { return piece.first_query + row / shape.share; }

    void start() {
        for (int64_t row = 0; row < rows; row++) {
            const float* const from = piece.queries + row / shape.share * shape.query_stride +
                                      row % shape.share * shape.head_dim;
            for (int64_t i = 0; i < dims; i += num_lanes) {
                store(queries + row * dims + i, load_some(from + i, clipped(shape.head_dim - i)) * all(shape.scale));
                store(sums + row * dims + i, all(0));
            }
            largest_score[row] = lowest;
            weight_sum[row] = 0;
        }
    }

    static int64_t clipped(int64_t count) { return count < 0 ? 0 : count; }

    const char* key_row(int64_t token) const {
        const int64_t row_bytes = shape.head_dim * static_cast<int64_t>(item_bytes(shape.pool_kind));
        return piece.keys + piece.blocks[token / shape.block_size] * shape.block_bytes +
               token % shape.block_size * row_bytes;
    }

    // Keys as [step][dims] or, turned, as [dims][step]; values as [step][dims].
    void fetch(int64_t first, int64_t count) {
        const bool turned = rows > few_rows;
        float one_key[512];
        for (int64_t i = 0; i < count; i++) {
            const char* const key = key_row(first + i);
            widen_row(key + shape.side_bytes, values + i * dims);
            if (!turned) {
                widen_row(key, keys + i * dims);
                continue;
            }
            widen_row(key, one_key);
            for (int64_t d = 0; d < shape.head_dim; d++) keys[d * key_step + i] = one_key[d];
        }
    }

    void widen_row(const char* from, float* to) const {
        switch (shape.pool_kind) {
            case Kind::float32: return widen_as(reinterpret_cast<const float*>(from), to);
            case Kind::bfloat16: return widen_as(reinterpret_cast<const BFloat16*>(from), to);
            case Kind::float16: return widen_as(reinterpret_cast<const Float16*>(from), to);
        }
    }
    template <class Item>
    void widen_as(const Item* from, float* to) const {
        for (int64_t i = 0; i < dims; i += num_lanes) store(to + i, load_some(from + i, clipped(shape.head_dim - i)));
    }

    // The keys that a row sees of [first, first + count), as a range relative to first.
    struct Seen {
        int64_t begin, end;
    };
    Seen seen(int64_t row, int64_t first, int64_t count) const {
        const int64_t end = position(row) + 1 - first;
        const int64_t begin = shape.window > 0 ? position(row) + 1 - shape.window - first : 0;
        return {begin < 0 ? 0 : begin, end < count ? end : count};
    }

    void score_row(int64_t row, int64_t count) {
        float* const to = scores + row * key_step;
        const float* const query = queries + row * dims;
        if (rows > few_rows) return score_turned(query, to, count);
        for (int64_t i = 0; i < count; i++) {
            Lanes products = all(0);
            for (int64_t d = 0; d < dims; d += num_lanes) {
                products = fma(load(query + d), load(keys + i * dims + d), products);
            }
            to[i] = sum(products);
        }
    }

    void score_turned(const float* query, float* to, int64_t count) const {
        for (int64_t i = 0; i < count; i += 2 * num_lanes) {
            Lanes first = all(0), second = all(0);
            for (int64_t d = 0; d < shape.head_dim; d++) {
                const Lanes item = all(query[d]);
                first = fma(item, load(keys + d * key_step + i), first);
                second = fma(item, load(keys + d * key_step + i + num_lanes), second);
            }
            store(to + i, first);
            store(to + i + num_lanes, second);
        }
    }

    // Scores become weights; what was summed before is scaled to the new largest score.
    void weigh_row(int64_t row, Seen seen) {
        float* const to = scores + row * key_step;
        for (int64_t i = 0; i < key_step; i += num_lanes) store(to + i, soft_capped(load(to + i), shape.soft_cap));
        for (int64_t i = 0; i < key_step; i++) {
            if (i < seen.begin || i >= seen.end) to[i] = -__builtin_inff();
        }
        Lanes most = all(largest_score[row]);
        for (int64_t i = 0; i < key_step; i += num_lanes) most = max(most, load(to + i));
        const float now_largest = tandem::TANDEM_ISA_NAMESPACE::largest(most);
        Lanes weights = all(0);
        for (int64_t i = 0; i < key_step; i += num_lanes) {
            const Lanes weight = exp(load(to + i) - all(now_largest));
            store(to + i, weight);
            weights = weights + weight;
        }
        rescale_row(row, largest_score[row] - now_largest);
        weight_sum[row] += sum(weights);
        largest_score[row] = now_largest;
    }

    void rescale_row(int64_t row, float difference) {
        if (difference == 0) return;
        float factors[num_lanes];
        store(factors, exp(all(difference)));
        weight_sum[row] *= factors[0];
        for (int64_t d = 0; d < dims; d += num_lanes) {
            store(sums + row * dims + d, load(sums + row * dims + d) * all(factors[0]));
        }
    }

    void add_values(int64_t row, Seen seen) {
        const float* const weights = scores + row * key_step;
        for (int64_t d = 0; d < dims; d += num_lanes) {
            Lanes total = load(sums + row * dims + d);
            for (int64_t i = seen.begin; i < seen.end; i++) {
                total = fma(all(weights[i]), load(values + i * dims + d), total);
            }
            store(sums + row * dims + d, total);
        }
    }

    void run() {
        start();
        for (int64_t first = piece.first_key; first < piece.end_key; first += key_step) {
            const int64_t count = piece.end_key - first < key_step ? piece.end_key - first : key_step;
            fetch(first, count);
            for (int64_t row = 0; row < rows; row++) {
                const Seen range = seen(row, first, count);
                if (range.begin >= range.end) continue;
                score_row(row, range.end);
                weigh_row(row, range);
                add_values(row, range);
            }
        }
        if (piece.part != nullptr) return keep_part();
        for (int64_t row = 0; row < rows; row++) put_row(row);
    }

    void put_row(int64_t row) const {
        const int64_t place = row / shape.share * shape.output_stride + row % shape.share * shape.head_dim;
        if (shape.output_kind == Kind::bfloat16) return put_as(row, static_cast<BFloat16*>(piece.output) + place);
        put_as(row, static_cast<float*>(piece.output) + place);
    }
    template <class Item>
    void put_as(int64_t row, Item* to) const {
        const Lanes scale = all(1.0f / weight_sum[row]);
        for (int64_t d = 0; d < shape.head_dim; d += num_lanes) {
            store_some(to + d, shape.head_dim - d, load(sums + row * dims + d) * scale);
        }
    }

    void keep_part() const {
        for (int64_t row = 0; row < rows; row++) {
            float* const to = piece.part + row * (2 + shape.head_dim);
            to[0] = largest_score[row];
            to[1] = weight_sum[row];
            for (int64_t d = 0; d < shape.head_dim; d++) to[2 + d] = sums[row * dims + d];
        }
    }
};

inline void attend(const AttentionShape& shape, const AttentionPiece& piece, char* scratch) {
    LanesAttention(shape, piece, scratch).run();
}

}  // namespace tandem::TANDEM_ISA_NAMESPACE
