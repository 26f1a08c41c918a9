// Attention with the tiles of AMX, for bfloat16 caches.
//
// Scores are computed as keys × queriesᵀ, [keys][16 queries]: the cache's keys are tiles as they lie, and the softmax
// over keys becomes plain arithmetic of rows, a lane to each query. The weights are turned for the sums, weights ×
// values, [16 queries][dims]; the values are interleaved by pairs of tokens, once for all queries of the piece.
#pragma once

#include "attention_lanes.h"
#include "tiles_amx.h"
#include "transpose_avx512.h"

namespace tandem::TANDEM_ISA_NAMESPACE {

constexpr int64_t tile_keys = 16;    // of keys × queriesᵀ
constexpr int64_t tile_tokens = 32;  // of weights × values
constexpr int64_t tile_dims = 32;    // of keys × queriesᵀ; of weights × values in two tiles, one for each half line
alignas(64) constexpr char no_values[1024] = {};  // of tokens past the end: what lies there may be anything, NaN too

// Two to the x, for weights that become bfloat16: to within 1e-4. Nothing is added up that would not vanish beside 1.
inline __m512 coarse_exp2(__m512 x) {
    const __m512 clamped = _mm512_max_ps(x, _mm512_set1_ps(-126.0f));
    const __m512 power = _mm512_roundscale_ps(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(clamped, power);
    __m512 sum = _mm512_set1_ps(0.00961813f);
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.05550411f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.24022651f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.69314718f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, power);
}

// Sixteen queries: a tile's lanes, and what has been summed for them.
struct QueryTile {
    __m512i positions;  // of each lane's token; lanes without a query repeat the last
    int64_t first, last;
    __m512 largest;  // score so far
    __m512 weight_sum;
};

struct TileAttention {
    const AttentionShape& shape;
    const AttentionPiece& piece;
    int64_t dims, rows, num_tiles;
    float score_to_power;  // scores are kept unscaled; this makes them exponents of two
    QueryTile tiles[most_piece_rows / tile_rows];
    char *queries, *values, *weights, *gathered;
    float *sums, *scores;
    const char* key_rows[key_step];  // the keys of the step, null past the end
    int64_t ahead = 0, ahead_end = 0;  // tokens to prefetch

    TileAttention(const AttentionShape& shape, const AttentionPiece& piece, char* scratch)
        : shape(shape),
          piece(piece),
          dims(shape.head_dim),
          rows(piece.num_queries * shape.share),
          num_tiles((rows + tile_rows - 1) / tile_rows),
          score_to_power(shape.scale * 1.44269504f) {
        auto part = [&](int64_t count) { return scratch += count, scratch - count; };
        scores = reinterpret_cast<float*>(part(key_step * tile_row_bytes));
        weights = part(key_step / tile_tokens * tile_bytes);
        sums = reinterpret_cast<float*>(part(num_tiles * dims * tile_row_bytes));
        queries = part(num_tiles * dims / tile_dims * tile_bytes);
        values = part(dims * key_step * sizeof(BFloat16));
        gathered = part(dims * key_step * sizeof(BFloat16));
    }

    const float* query_row(int64_t row) const {
        return piece.queries + row / shape.share * shape.query_stride + row % shape.share * dims;
    }
    int64_t position(int64_t row) const { return piece.first_query + row / shape.share; }

    void start_tile(int64_t index) {
        QueryTile& tile = tiles[index];
        int positions[tile_rows];
        for (int64_t lane = 0; lane < tile_rows; lane++) {
            const int64_t row = index * tile_rows + lane;
            positions[lane] = static_cast<int>(position(row < rows ? row : rows - 1));
        }
        tile.positions = _mm512_loadu_si512(positions);
        tile.first = positions[0];
        tile.last = positions[tile_rows - 1];
        tile.largest = _mm512_set1_ps(lowest);
        tile.weight_sum = _mm512_setzero_ps();
        memset(sums + index * dims * tile_rows, 0, dims * tile_row_bytes);
        turn_queries(index);
    }

    // [16 queries][32 dims] to [16 pairs of dims][16 queries][2].
    void turn_queries(int64_t index) {
        for (int64_t step = 0; step < dims / tile_dims; step++) {
            __m512i lines[tile_rows];
            for (int64_t lane = 0; lane < tile_rows; lane++) {
                const int64_t row = index * tile_rows + lane;
                const float* const from = query_row(row < rows ? row : rows - 1) + step * tile_dims;
                lines[lane] = reinterpret_cast<__m512i>(
                    _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + num_lanes), _mm512_loadu_ps(from)));
            }
            transpose(lines);
            char* const to = queries + (index * (dims / tile_dims) + step) * tile_bytes;
            for (int64_t pair = 0; pair < tile_rows; pair++) _mm512_store_si512(to + pair * tile_row_bytes, lines[pair]);
        }
    }

    void find_keys(int64_t first) {
        const int64_t row_bytes = shape.head_dim * static_cast<int64_t>(sizeof(BFloat16));
        for (int64_t i = 0; i < key_step;) {
            const int64_t token = first + i;
            const bool inside = token < piece.end_key;
            const int64_t offset = token & (shape.block_size - 1);
            const int64_t run = shape.block_size - offset < key_step - i ? shape.block_size - offset : key_step - i;
            const char* const block =
                inside ? piece.keys + piece.blocks[token >> __builtin_ctzll(shape.block_size)] * shape.block_bytes : nullptr;
            for (int64_t j = 0; j < run; j++, i++) {
                key_rows[i] = inside && first + i < piece.end_key ? block + (offset + j) * row_bytes : nullptr;
            }
        }
    }

    // Keys of small blocks do not lie in runs of a tile's length.
    const char* keys_of_tile(int64_t first) {
        if (shape.block_size >= tile_keys) return key_rows[first];
        char* const to = gathered + first * dims * sizeof(BFloat16);
        for (int64_t i = 0; i < tile_keys; i++) {
            if (key_rows[first + i] == nullptr) break;
            memcpy(to + i * dims * sizeof(BFloat16), key_rows[first + i], dims * sizeof(BFloat16));
        }
        return to;
    }

    const char* value_row(int64_t token) const {
        return key_rows[token] == nullptr ? no_values : key_rows[token] + shape.side_bytes;
    }

    // [64 tokens][dims] to tiles [2][dims / 16][16 pairs of tokens][16 dims][2]. Within each 32 dims the first tile gets
    // four of every eight, as the processor interleaves them; `put` restores the order.
    void interleave_values(int64_t num_token_tiles) {
        for (int64_t pair = 0; pair < num_token_tiles * tile_rows; pair++) {
            prefetch_token();
            const char* const first = value_row(2 * pair);
            const char* const second = value_row(2 * pair + 1);
            char* to = values + pair / tile_rows * (dims / tile_rows) * tile_bytes + pair % tile_rows * tile_row_bytes;
            for (int64_t offset = 0; offset < dims * 2; offset += tile_row_bytes, to += 2 * tile_bytes) {
                const __m512i a = _mm512_loadu_si512(first + offset), b = _mm512_loadu_si512(second + offset);
                _mm512_store_si512(to, _mm512_unpacklo_epi16(a, b));
                _mm512_store_si512(to + tile_bytes, _mm512_unpackhi_epi16(a, b));
            }
        }
    }

    // The tokens of a step are asked for one by one while the step before is computed: all at once they would keep the
    // processor from anything else until the last had come.
    void look_ahead(int64_t first) {
        ahead = first;
        ahead_end = first + key_step < piece.end_key ? first + key_step : piece.end_key;
    }
    void prefetch_token() {
        if (ahead >= ahead_end) return;
        const int64_t row_bytes = dims * static_cast<int64_t>(sizeof(BFloat16));
        const char* const keys = piece.keys +
                                 piece.blocks[ahead >> __builtin_ctzll(shape.block_size)] * shape.block_bytes +
                                 (ahead & (shape.block_size - 1)) * row_bytes;
        for (int64_t byte = 0; byte < row_bytes; byte += tile_row_bytes) {
            __builtin_prefetch(keys + byte);
            __builtin_prefetch(keys + shape.side_bytes + byte);
        }
        ahead++;
    }
    void prefetch_rest() {
        while (ahead < ahead_end) prefetch_token();
    }

    void score(int64_t index, const char* const* keys, int64_t num_key_tiles) {
        const int64_t row_bytes = dims * static_cast<int64_t>(sizeof(BFloat16));
        for (int64_t i = 0; i < num_key_tiles; i += 2) {
            const bool both = i + 1 < num_key_tiles;
            const char* tile = queries + index * (dims / tile_dims) * tile_bytes;
            TANDEM_TILE_ZERO(0);
            TANDEM_TILE_ZERO(1);
            for (int64_t offset = 0; offset < row_bytes; offset += tile_row_bytes, tile += tile_bytes) {
                TANDEM_TILE_LOAD(6, tile, tile_row_bytes);
                TANDEM_TILE_LOAD(4, keys[i] + offset, row_bytes);
                TANDEM_TILE_PRODUCT(0, 4, 6);
                if (!both) continue;
                TANDEM_TILE_LOAD(5, keys[i + 1] + offset, row_bytes);
                TANDEM_TILE_PRODUCT(1, 5, 6);
            }
            TANDEM_TILE_STORE(0, scores + i * tile_keys * tile_rows, tile_row_bytes);
            if (both) TANDEM_TILE_STORE(1, scores + (i + 1) * tile_keys * tile_rows, tile_row_bytes);
        }
    }

    bool sees_all(const QueryTile& tile, int64_t first) const {
        const bool none_later = first + key_step - 1 <= tile.first && first + key_step <= piece.end_key;
        return none_later && (shape.window == 0 || first > tile.last - shape.window);
    }
    bool sees_none(const QueryTile& tile, int64_t first) const {
        return first > tile.last || (shape.window > 0 && first + key_step - 1 <= tile.first - shape.window);
    }

    void cap_scores() {
        for (int64_t i = 0; i < key_step * tile_rows; i += num_lanes) {
            const Lanes capped = soft_capped(load(scores + i) * all(shape.scale), shape.soft_cap);
            store(scores + i, capped / all(shape.scale));
        }
    }

    void hide_unseen(const QueryTile& tile, int64_t first) {
        const __m512 hidden = _mm512_set1_ps(-__builtin_inff());
        for (int64_t i = 0; i < key_step; i++) {
            const __m512i key = _mm512_set1_epi32(static_cast<int>(first + i));
            __mmask16 seen = first + i < piece.end_key ? _mm512_cmple_epi32_mask(key, tile.positions) : 0;
            if (shape.window > 0) {
                const __m512i end = _mm512_set1_epi32(static_cast<int>(first + i + shape.window));
                seen &= _mm512_cmplt_epi32_mask(tile.positions, end);
            }
            float* const row = scores + i * tile_rows;
            _mm512_store_ps(row, _mm512_mask_mov_ps(hidden, seen, _mm512_load_ps(row)));
        }
    }

    // Scores become weights; what was summed before is scaled to the new largest score.
    void weigh(int64_t index, int64_t num_token_tiles) {
        QueryTile& tile = tiles[index];
        __m512 now = tile.largest, other = tile.largest;
        for (int64_t i = 0; i < num_token_tiles * tile_tokens; i += 2) {
            now = _mm512_max_ps(now, _mm512_load_ps(scores + i * tile_rows));
            other = _mm512_max_ps(other, _mm512_load_ps(scores + (i + 1) * tile_rows));
        }
        now = _mm512_max_ps(now, other);
        if (_mm512_cmp_ps_mask(now, tile.largest, _CMP_NEQ_UQ) != 0) rescale(index, now);
        const __m512 factor = _mm512_set1_ps(score_to_power), shift = _mm512_mul_ps(now, factor);
        __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
        for (int64_t part = 0; part < num_token_tiles; part++) {
            const float* row = scores + part * tile_tokens * tile_rows;
            __m512i pairs[tile_rows];
            for (int64_t i = 0; i < tile_rows; i++, row += 2 * tile_rows) {
                prefetch_token();
                const __m512 first = coarse_exp2(_mm512_fmsub_ps(_mm512_load_ps(row), factor, shift));
                const __m512 second = coarse_exp2(_mm512_fmsub_ps(_mm512_load_ps(row + tile_rows), factor, shift));
                even = _mm512_add_ps(even, first);
                odd = _mm512_add_ps(odd, second);
                pairs[i] = paired(first, second);
            }
            transpose(pairs);  // to [16 queries][32 tokens]
            char* const to = weights + part * tile_bytes;
            for (int64_t i = 0; i < tile_rows; i++) _mm512_store_si512(to + i * tile_row_bytes, pairs[i]);
        }
        tile.weight_sum = _mm512_add_ps(tile.weight_sum, _mm512_add_ps(even, odd));
    }

    // Each lane's two numbers as bfloat16, the first in the lower half.
    static __m512i paired(__m512 first, __m512 second) {
        const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                                     22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        return _mm512_permutexvar_epi16(interleaved, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
    }

    int64_t rows_of(int64_t index) const {
        return rows - index * tile_rows < tile_rows ? rows - index * tile_rows : tile_rows;
    }

    void rescale(int64_t index, __m512 now) {
        QueryTile& tile = tiles[index];
        const __m512 difference = _mm512_mul_ps(_mm512_sub_ps(tile.largest, now), _mm512_set1_ps(score_to_power));
        const __m512 factor = coarse_exp2(difference);
        alignas(64) float factors[tile_rows];
        _mm512_store_ps(factors, factor);
        for (int64_t row = 0; row < rows_of(index); row++) {
            const __m512 row_factor = _mm512_set1_ps(factors[row]);
            float* to = sums + index * dims * tile_rows + row * tile_rows;
            for (int64_t i = 0; i < dims / tile_rows; i++, to += tile_rows * tile_rows) {
                _mm512_store_ps(to, _mm512_mul_ps(_mm512_load_ps(to), row_factor));
            }
        }
        tile.weight_sum = _mm512_mul_ps(tile.weight_sum, factor);
        tile.largest = now;
    }

    // Sums lie in tiles [dims / 16][16 queries][16 dims], dims in the order of the values.
    void add_values(int64_t index, int64_t num_token_tiles) {
        constexpr int64_t sum_tile = tile_rows * tile_rows;
        TANDEM_TILE_LOAD(4, weights, tile_row_bytes);
        if (num_token_tiles > 1) TANDEM_TILE_LOAD(5, weights + tile_bytes, tile_row_bytes);
        const char* const later = values + dims / tile_rows * tile_bytes;
        for (int64_t dim = 0; dim < dims; dim += tile_dims) {
            float* const to = sums + (index * dims + dim) * tile_rows;
            const int64_t offset = dim / tile_rows * tile_bytes;
            TANDEM_TILE_LOAD(0, to, tile_row_bytes);
            TANDEM_TILE_LOAD(6, values + offset, tile_row_bytes);
            TANDEM_TILE_PRODUCT(0, 4, 6);
            TANDEM_TILE_LOAD(1, to + sum_tile, tile_row_bytes);
            TANDEM_TILE_LOAD(7, values + offset + tile_bytes, tile_row_bytes);
            TANDEM_TILE_PRODUCT(1, 4, 7);
            if (num_token_tiles > 1) {
                TANDEM_TILE_LOAD(6, later + offset, tile_row_bytes);
                TANDEM_TILE_PRODUCT(0, 5, 6);
                TANDEM_TILE_LOAD(7, later + offset + tile_bytes, tile_row_bytes);
                TANDEM_TILE_PRODUCT(1, 5, 7);
            }
            TANDEM_TILE_STORE(0, to, tile_row_bytes);
            TANDEM_TILE_STORE(1, to + sum_tile, tile_row_bytes);
        }
    }

    void step(int64_t first) {
        const int64_t count = piece.end_key - first < key_step ? piece.end_key - first : key_step;
        const int64_t num_key_tiles = (count + tile_keys - 1) / tile_keys;
        const int64_t num_token_tiles = (count + tile_tokens - 1) / tile_tokens;
        find_keys(first);
        look_ahead(first + key_step);
        const char* keys[key_step / tile_keys];
        for (int64_t i = 0; i < num_key_tiles; i++) keys[i] = keys_of_tile(i * tile_keys);
        interleave_values(num_token_tiles);
        for (int64_t index = 0; index < num_tiles; index++) {
            if (sees_none(tiles[index], first)) continue;
            score(index, keys, num_key_tiles);
            if (shape.soft_cap > 0) cap_scores();
            if (!sees_all(tiles[index], first)) hide_unseen(tiles[index], first);
            weigh(index, num_token_tiles);
            add_values(index, num_token_tiles);
        }
        prefetch_rest();
    }

    void run() {
        look_ahead(piece.first_key);
        prefetch_rest();
        for (int64_t index = 0; index < num_tiles; index++) start_tile(index);
        for (int64_t first = piece.first_key; first < piece.end_key; first += key_step) step(first);
        for (int64_t index = 0; index < num_tiles; index++) end_tile(index);
    }

    void end_tile(int64_t index) {
        alignas(64) float largest_scores[tile_rows], weight_sums[tile_rows];
        _mm512_store_ps(largest_scores, _mm512_mul_ps(tiles[index].largest, _mm512_set1_ps(shape.scale)));
        _mm512_store_ps(weight_sums, tiles[index].weight_sum);
        for (int64_t lane = 0; lane < rows_of(index); lane++) {
            const int64_t row = index * tile_rows + lane;
            const float* const from = sums + index * dims * tile_rows + lane * tile_rows;
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
        for (int64_t dim = 0; dim < dims; dim += tile_dims, from += 2 * tile_rows * tile_rows) {
            const __m512 low = _mm512_mul_ps(_mm512_load_ps(from), _mm512_set1_ps(factor));
            const __m512 high = _mm512_mul_ps(_mm512_load_ps(from + tile_rows * tile_rows), _mm512_set1_ps(factor));
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
    return shape.pool_kind == Kind::bfloat16 && shape.head_dim % tile_dims == 0 && whole_blocks &&
           piece.num_queries * shape.share <= most_piece_rows && shape.scale > 0;
}

inline void attend_amx(const AttentionShape& shape, const AttentionPiece& piece, char* scratch) {
    if (!fits_tiles(shape, piece)) return attend(shape, piece, scratch);
    TileAttention(shape, piece, scratch).run();
}

}  // namespace tandem::TANDEM_ISA_NAMESPACE
