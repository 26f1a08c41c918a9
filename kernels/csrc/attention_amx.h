// Attention with the tiles of AMX, for bfloat16 caches.
//
// Scores are computed as keys × queriesᵀ, [keys][queries]: the cache's keys are tiles as they lie, and the softmax over
// keys becomes plain arithmetic of rows, a lane to each query. The weights are turned for the sums, weights × values,
// [queries][dims]. Tiles of 16 queries are for prompts; a token's few heads take tiles of 4, of less work and equal
// numbers.
#pragma once

#include "attention_lanes.h"
#include "key_step_amx.h"
#include "weights_amx.h"

namespace tandem::TANDEM_ISA_NAMESPACE {

constexpr int64_t most_narrow_rows = 8;

// Registers 0 and 1 take scores; 2 and 3 sums; 4 and 5 keys, or values; 6 queries; 7 weights.
inline void set_narrow_tiles() {
    if (tiles_set == Tiles::narrow) return;
    TileShapes shapes;
    shapes.row_bytes[0] = shapes.row_bytes[1] = shapes.row_bytes[6] = narrow_width * sizeof(float);
    shapes.rows[2] = shapes.rows[3] = shapes.rows[7] = narrow_width;
    set_tiles(Tiles::narrow, shapes);
}

template <int64_t width>
struct QueryTile {
    __m512i positions;  // of each lane's token; lanes without a query repeat the last
    int64_t first, last;
    __m512 largest;  // score so far
    __m512 weight_sum;
};

template <int64_t width>
struct TileAttention {
    using Weights = TANDEM_ISA_NAMESPACE::Weights<width>;
    static constexpr int64_t score_bytes = width * sizeof(float);  // of a key
    static constexpr int64_t line_keys = Weights::line_keys;
    static constexpr int64_t query_tile_bytes = tile_rows * score_bytes;
    static constexpr int64_t weight_tile_bytes = width * tile_row_bytes;
    static constexpr int64_t sum_tile = width * tile_rows;  // floats

    const AttentionShape& shape;
    const AttentionPiece& piece;
    int64_t dims, row_bytes, rows, num_tiles;
    float score_to_power;  // scores are kept unscaled; this makes them exponents of two
    QueryTile<width> tiles[most_piece_rows / tile_rows];
    char *queries, *weights;
    float *sums, *scores;
    KeyStep step;
    CacheAhead ahead;

    TileAttention(const AttentionShape& shape, const AttentionPiece& piece, char* scratch)
        : shape(shape),
          piece(piece),
          dims(shape.head_dim),
          row_bytes(dims * static_cast<int64_t>(sizeof(BFloat16))),
          rows(piece.num_queries * shape.share),
          num_tiles((rows + width - 1) / width),
          score_to_power(shape.scale * 1.44269504f),
          step(shape, piece),
          ahead(shape, piece) {
        auto part = [&](int64_t count) { return scratch += count, scratch - count; };
        scores = reinterpret_cast<float*>(part(key_step * score_bytes));
        weights = part(key_step / tile_tokens * weight_tile_bytes);
        sums = reinterpret_cast<float*>(part(num_tiles * dims * width * sizeof(float)));
        queries = part(num_tiles * dims / tile_dims * query_tile_bytes);
        step.place(scratch);
    }

    const float* query_row(int64_t row) const {
        return piece.queries + row / shape.share * shape.query_stride + row % shape.share * dims;
    }
    int64_t position(int64_t row) const { return piece.first_query + row / shape.share; }

    void start_tile(int64_t index) {
        QueryTile<width>& tile = tiles[index];
        int positions[num_lanes];
        for (int64_t lane = 0; lane < num_lanes; lane++) {
            const int64_t row = index * width + lane % width;
            positions[lane] = static_cast<int>(position(row < rows ? row : rows - 1));
        }
        tile.positions = _mm512_loadu_si512(positions);
        tile.first = positions[0];
        tile.last = positions[width - 1];
        tile.largest = _mm512_set1_ps(lowest);
        tile.weight_sum = _mm512_setzero_ps();
        memset(sums + index * dims * width, 0, dims * width * sizeof(float));
        turn_queries(index);
    }

    // [queries][32 dims] to [16 pairs of dims][queries][2].
    void turn_queries(int64_t index) {
        char* to = queries + index * (dims / tile_dims) * query_tile_bytes;
        for (int64_t dim = 0; dim < dims; dim += tile_dims, to += query_tile_bytes) {
            __m512i lines[tile_rows] = {};
            for (int64_t lane = 0; lane < width; lane++) {
                const int64_t row = index * width + lane;
                const float* const from = query_row(row < rows ? row : rows - 1) + dim;
                lines[lane] = reinterpret_cast<__m512i>(
                    _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + num_lanes), _mm512_loadu_ps(from)));
            }
            transpose(lines);
            for (int64_t pair = 0; pair < tile_rows; pair++) {
                memcpy(to + pair * score_bytes, &lines[pair], score_bytes);
            }
        }
    }

    void score(int64_t index) {
        float* to = scores;
        for (int64_t i = 0; i < step.num_key_tiles; i += 2, to += 2 * tile_keys * width) {
            const bool both = i + 1 < step.num_key_tiles;
            const char* const keys = step.runs[i];
            const char* const later = both ? step.runs[i + 1] : nullptr;
            const char* tile = queries + index * (dims / tile_dims) * query_tile_bytes;
            TANDEM_TILE_ZERO(0);
            TANDEM_TILE_ZERO(1);
            for (int64_t offset = 0; offset < row_bytes; offset += tile_row_bytes, tile += query_tile_bytes) {
                TANDEM_TILE_LOAD(6, tile, score_bytes);
                TANDEM_TILE_LOAD(4, keys + offset, row_bytes);
                TANDEM_TILE_PRODUCT(0, 4, 6);
                if (!both) continue;
                TANDEM_TILE_LOAD(5, later + offset, row_bytes);
                TANDEM_TILE_PRODUCT(1, 5, 6);
            }
            TANDEM_TILE_STORE(0, to, score_bytes);
            if (both) TANDEM_TILE_STORE(1, to + tile_keys * width, score_bytes);
            if constexpr (width == narrow_width) ahead.ask_for(8);
        }
    }

    bool sees_all(const QueryTile<width>& tile) const {
        const bool none_later = step.first + key_step - 1 <= tile.first && step.count == key_step;
        return none_later && (shape.window == 0 || step.first > tile.last - shape.window);
    }
    bool sees_none(const QueryTile<width>& tile) const {
        return step.first > tile.last || (shape.window > 0 && step.first + key_step - 1 <= tile.first - shape.window);
    }

    void cap_scores() {
        for (int64_t i = 0; i < key_step * width; i += num_lanes) {
            const Lanes capped = soft_capped(load(scores + i) * all(shape.scale), shape.soft_cap);
            store(scores + i, capped / all(shape.scale));
        }
    }

    void hide_unseen(const QueryTile<width>& tile) {
        const __m512 hidden = _mm512_set1_ps(-__builtin_inff());
        const __m512i last = _mm512_min_epi32(tile.positions, _mm512_set1_epi32(static_cast<int>(piece.end_key - 1)));
        for (int64_t i = 0; i < key_step; i += line_keys) {
            const int first = static_cast<int>(step.first + i);
            const __m512i key = _mm512_add_epi32(_mm512_set1_epi32(first), Weights::key_of_lane());
            __mmask16 seen = _mm512_cmple_epi32_mask(key, last);
            if (shape.window > 0) {
                const __m512i end = _mm512_add_epi32(key, _mm512_set1_epi32(static_cast<int>(shape.window)));
                seen &= _mm512_cmplt_epi32_mask(tile.positions, end);
            }
            float* const line = scores + i * width;
            _mm512_store_ps(line, _mm512_mask_mov_ps(hidden, seen, _mm512_load_ps(line)));
        }
    }

    // Scores become weights; what was summed before is scaled to the new largest score.
    void weigh(int64_t index) {
        QueryTile<width>& tile = tiles[index];
        const int64_t num_lines = step.num_token_tiles * tile_tokens / line_keys;
        __m512 now = tile.largest, other = tile.largest;
        for (int64_t i = 0; i < num_lines; i += 2) {
            now = _mm512_max_ps(now, _mm512_load_ps(scores + i * num_lanes));
            other = _mm512_max_ps(other, _mm512_load_ps(scores + (i + 1) * num_lanes));
        }
        now = Weights::largest_of_keys(_mm512_max_ps(now, other));
        if (_mm512_cmp_ps_mask(now, tile.largest, _CMP_NEQ_UQ) != 0) rescale(index, now);
        const __m512 factor = _mm512_set1_ps(score_to_power);
        const Exponent exponent = {factor, _mm512_mul_ps(now, factor)};
        __m512 totals[4] = {};
        for (int64_t part = 0; part < step.num_token_tiles; part++) {
            Weights::put(scores + part * tile_tokens * width, exponent, totals, weights + part * weight_tile_bytes,
                         [this](int count) { ahead.ask_for(count); });
        }
        tile.weight_sum = _mm512_add_ps(tile.weight_sum, Weights::total(totals));
    }

    int64_t rows_of(int64_t index) const { return rows - index * width < width ? rows - index * width : width; }

    void rescale(int64_t index, __m512 now) {
        QueryTile<width>& tile = tiles[index];
        const __m512 difference = _mm512_mul_ps(_mm512_sub_ps(tile.largest, now), _mm512_set1_ps(score_to_power));
        const __m512 factor = coarse_exp2(difference);
        alignas(64) float factors[num_lanes];
        _mm512_store_ps(factors, factor);
        for (int64_t row = 0; row < rows_of(index); row++) {
            const __m512 row_factor = _mm512_set1_ps(factors[row]);
            float* to = sums + index * dims * width + row * tile_rows;
            for (int64_t i = 0; i < dims / tile_rows; i++, to += sum_tile) {
                _mm512_store_ps(to, _mm512_mul_ps(_mm512_load_ps(to), row_factor));
            }
        }
        tile.weight_sum = _mm512_mul_ps(tile.weight_sum, factor);
        tile.largest = now;
    }

    // Sums lie in tiles [dims / 16][queries][16 dims], dims in the order of the values.
    void add_values(int64_t index) {
        const bool both = step.num_token_tiles > 1;
        const char* first = step.values;
        const char* later = first + dims / tile_rows * tile_bytes;
        const char* const later_weights = weights + weight_tile_bytes;
        if constexpr (width == tile_rows) {
            if (both) TANDEM_TILE_LOAD(6, later_weights, tile_row_bytes);
        }
        float* to = sums + index * dims * width;
        for (int64_t dim = 0; dim < dims; dim += tile_dims) {
            TANDEM_TILE_LOAD(7, weights, tile_row_bytes);
            TANDEM_TILE_LOAD(2, to, tile_row_bytes);
            TANDEM_TILE_LOAD(4, first, tile_row_bytes);
            TANDEM_TILE_PRODUCT(2, 7, 4);
            TANDEM_TILE_LOAD(3, to + sum_tile, tile_row_bytes);
            TANDEM_TILE_LOAD(5, first + tile_bytes, tile_row_bytes);
            TANDEM_TILE_PRODUCT(3, 7, 5);
            if (both) {
                TANDEM_TILE_LOAD(4, later, tile_row_bytes);
                TANDEM_TILE_LOAD(5, later + tile_bytes, tile_row_bytes);
                if constexpr (width == tile_rows) {
                    TANDEM_TILE_PRODUCT(2, 6, 4);
                    TANDEM_TILE_PRODUCT(3, 6, 5);
                } else {
                    TANDEM_TILE_LOAD(7, later_weights, tile_row_bytes);
                    TANDEM_TILE_PRODUCT(2, 7, 4);
                    TANDEM_TILE_PRODUCT(3, 7, 5);
                    ahead.ask_for(8);
                }
            }
            TANDEM_TILE_STORE(2, to, tile_row_bytes);
            TANDEM_TILE_STORE(3, to + sum_tile, tile_row_bytes);
            first += 2 * tile_bytes, later += 2 * tile_bytes, to += 2 * sum_tile;
        }
    }

    void run_step(int64_t first) {
        ahead.look_at(first + key_step);
        step.open(first);
        step.interleave_values([this](int64_t pair) {
            if (width == tile_rows || pair % 2 == 1) ahead.ask_for(1);
        });
        for (int64_t index = 0; index < num_tiles; index++) {
            if (sees_none(tiles[index])) continue;
            score(index);
            if (shape.soft_cap > 0) cap_scores();
            if (!sees_all(tiles[index])) hide_unseen(tiles[index]);
            weigh(index);
            add_values(index);
        }
        ahead.ask_for(key_step);
    }

    void run() {
        ahead.look_at(piece.first_key);
        ahead.ask_for(key_step);
        width == narrow_width ? set_narrow_tiles() : set_whole_tiles();
        for (int64_t index = 0; index < num_tiles; index++) start_tile(index);
        for (int64_t first = piece.first_key; first < piece.end_key; first += key_step) run_step(first);
        for (int64_t index = 0; index < num_tiles; index++) end_tile(index);
    }

    void end_tile(int64_t index) {
        alignas(64) float largest_scores[num_lanes], weight_sums[num_lanes];
        _mm512_store_ps(largest_scores, _mm512_mul_ps(tiles[index].largest, _mm512_set1_ps(shape.scale)));
        _mm512_store_ps(weight_sums, tiles[index].weight_sum);
        for (int64_t lane = 0; lane < rows_of(index); lane++) {
            const int64_t row = index * width + lane;
            const float* const from = sums + index * dims * width + lane * tile_rows;
            put_row(row, from, piece.part == nullptr ? 1.0f / weight_sums[lane] : 1.0f);
            if (piece.part == nullptr) continue;
            float* const to = piece.part + row * (2 + dims);
            to[0] = largest_scores[lane];
            to[1] = weight_sums[lane];
        }
    }

    void put_row(int64_t row, const float* from, float factor) const {
        const __m512i first_half = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
        const __m512i second_half = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
        for (int64_t dim = 0; dim < dims; dim += tile_dims, from += 2 * sum_tile) {
            const __m512 low = _mm512_mul_ps(_mm512_load_ps(from), _mm512_set1_ps(factor));
            const __m512 high = _mm512_mul_ps(_mm512_load_ps(from + sum_tile), _mm512_set1_ps(factor));
            put(row, dim, {_mm512_permutex2var_ps(low, first_half, high)});
            put(row, dim + num_lanes, {_mm512_permutex2var_ps(low, second_half, high)});
        }
    }

    void put(int64_t row, int64_t dim, Lanes items) const {
        if (piece.part != nullptr) return store(piece.part + row * (2 + dims) + 2 + dim, items);
        const int64_t place = row / shape.share * shape.output_stride + row % shape.share * dims + dim;
        if (shape.output_kind == Kind::bfloat16) return store(static_cast<BFloat16*>(piece.output) + place, items);
        store(static_cast<float*>(piece.output) + place, items);
    }
};

inline bool fits_tiles(const AttentionShape& shape, const AttentionPiece& piece) {
    const bool whole_blocks = (shape.block_size & (shape.block_size - 1)) == 0;
    const bool whole_tiles = shape.head_dim % tile_dims == 0 && shape.head_dim <= most_tile_dims;
    return shape.pool_kind == Kind::bfloat16 && whole_tiles && whole_blocks &&
           piece.num_queries * shape.share <= most_piece_rows && shape.scale > 0;
}

inline void attend_amx(const AttentionShape& shape, const AttentionPiece& piece, char* scratch) {
    if (!fits_tiles(shape, piece)) return attend(shape, piece, scratch);
    const bool narrow = piece.num_queries * shape.share <= most_narrow_rows;
    narrow ? TileAttention<narrow_width>(shape, piece, scratch).run()
           : TileAttention<tile_rows>(shape, piece, scratch).run();
}

}  // namespace tandem::TANDEM_ISA_NAMESPACE
