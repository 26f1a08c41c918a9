// Attention with the tiles of AMX, for bfloat16 caches: everything stands on its side.
//
// Scores are computed as keys × queriesᵀ, [keys][16 queries]: the cache's keys are tiles as they lie, and the softmax
// over keys becomes plain arithmetic of rows, a lane to each query. Weighted values are summed as valuesᵀ × weights,
// [dims][16 queries], for which only the values have to be turned, once for all queries of the piece.
#pragma once

#include "attention_lanes.h"
#include "tiles_amx.h"
#include "transpose_avx512.h"

namespace tandem::TANDEM_ISA_NAMESPACE {

constexpr int64_t tile_keys = 16;    // of keys × queriesᵀ
constexpr int64_t tile_tokens = 32;  // of valuesᵀ × weights
constexpr int64_t tile_dims = 32;    // of keys × queriesᵀ, two to a pair

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
    char *queries, *turned_values, *weights, *gathered;
    float *sums, *scores;
    const char* key_rows[key_step];  // the keys of the step, null past the end

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
        turned_values = part(dims * key_step * sizeof(BFloat16));
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

    // Of two tokens, 16 dims: [16 dims][2]. What lies past the end may be anything, NaN too, and is taken as 0.
    __m512i value_pairs(int64_t token, int64_t dim) const {
        const __m512i first = value_dims(token, dim), second = value_dims(token + 1, dim);
        return _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
    }
    __m512i value_dims(int64_t token, int64_t dim) const {
        if (key_rows[token] == nullptr) return _mm512_setzero_si512();
        const char* const from = key_rows[token] + shape.side_bytes + dim * sizeof(BFloat16);
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }

    // [64 tokens][dims] to tiles [dims / 16][2][16 dims][32 tokens].
    void turn_values() {
        for (int64_t tile = 0; tile < dims / tile_rows * 2; tile++) {
            __m512i lines[tile_rows];
            for (int64_t pair = 0; pair < tile_rows; pair++) {
                lines[pair] = value_pairs(tile % 2 * tile_tokens + 2 * pair, tile / 2 * tile_rows);
            }
            transpose(lines);
            char* const to = turned_values + tile * tile_bytes;
            for (int64_t dim = 0; dim < tile_rows; dim++) _mm512_store_si512(to + dim * tile_row_bytes, lines[dim]);
        }
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

    // Scores become weights, two keys to a pair; what was summed before is scaled to the new largest score.
    void weigh(int64_t index) {
        QueryTile& tile = tiles[index];
        __m512 most[4] = {tile.largest, tile.largest, tile.largest, tile.largest};
        for (int64_t i = 0; i < key_step; i++) most[i % 4] = _mm512_max_ps(most[i % 4], _mm512_load_ps(scores + i * tile_rows));
        const __m512 now = _mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3]));
        if (_mm512_cmp_ps_mask(now, tile.largest, _CMP_NEQ_UQ) != 0) rescale(index, now);
        const __m512 factor = _mm512_set1_ps(score_to_power), shift = _mm512_mul_ps(now, factor);
        __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
        for (int64_t i = 0; i < key_step; i += 2) {
            const __m512 first = coarse_exp2(_mm512_fmsub_ps(_mm512_load_ps(scores + i * tile_rows), factor, shift));
            const __m512 second =
                coarse_exp2(_mm512_fmsub_ps(_mm512_load_ps(scores + (i + 1) * tile_rows), factor, shift));
            even = _mm512_add_ps(even, first);
            odd = _mm512_add_ps(odd, second);
            _mm512_store_si512(weights + i / 2 * tile_row_bytes, paired(first, second));
        }
        tile.weight_sum = _mm512_add_ps(tile.weight_sum, _mm512_add_ps(even, odd));
    }

    static __m512i paired(__m512 first, __m512 second) {
        const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                                     22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        return _mm512_permutexvar_epi16(interleaved, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
    }

    void rescale(int64_t index, __m512 now) {
        QueryTile& tile = tiles[index];
        const __m512 difference = _mm512_mul_ps(_mm512_sub_ps(tile.largest, now), _mm512_set1_ps(score_to_power));
        const __m512 factor = coarse_exp2(difference);
        float* const tile_sums = sums + index * dims * tile_rows;
        for (int64_t i = 0; i < dims * tile_rows; i += num_lanes) {
            _mm512_store_ps(tile_sums + i, _mm512_mul_ps(_mm512_load_ps(tile_sums + i), factor));
        }
        tile.weight_sum = _mm512_mul_ps(tile.weight_sum, factor);
        tile.largest = now;
    }

    void add_values(int64_t index, int64_t num_token_tiles) {
        TANDEM_TILE_LOAD(4, weights, tile_row_bytes);
        TANDEM_TILE_LOAD(5, weights + tile_bytes, tile_row_bytes);
        for (int64_t dim = 0; dim < dims; dim += 2 * tile_rows) {
            float* const to = sums + (index * dims + dim) * tile_rows;
            const char* const values = turned_values + dim / tile_rows * 2 * tile_bytes;
            TANDEM_TILE_LOAD(0, to, tile_row_bytes);
            TANDEM_TILE_LOAD(6, values, tile_row_bytes);
            TANDEM_TILE_PRODUCT(0, 6, 4);
            TANDEM_TILE_LOAD(1, to + tile_rows * tile_rows, tile_row_bytes);
            TANDEM_TILE_LOAD(7, values + 2 * tile_bytes, tile_row_bytes);
            TANDEM_TILE_PRODUCT(1, 7, 4);
            if (num_token_tiles > 1) {
                TANDEM_TILE_LOAD(6, values + tile_bytes, tile_row_bytes);
                TANDEM_TILE_PRODUCT(0, 6, 5);
                TANDEM_TILE_LOAD(7, values + 3 * tile_bytes, tile_row_bytes);
                TANDEM_TILE_PRODUCT(1, 7, 5);
            }
            TANDEM_TILE_STORE(0, to, tile_row_bytes);
            TANDEM_TILE_STORE(1, to + tile_rows * tile_rows, tile_row_bytes);
        }
    }

    void step(int64_t first) {
        const int64_t count = piece.end_key - first < key_step ? piece.end_key - first : key_step;
        const int64_t num_key_tiles = (count + tile_keys - 1) / tile_keys;
        find_keys(first);
        const char* keys[key_step / tile_keys];
        for (int64_t i = 0; i < num_key_tiles; i++) keys[i] = keys_of_tile(i * tile_keys);
        turn_values();
        for (int64_t index = 0; index < num_tiles; index++) {
            if (sees_none(tiles[index], first)) continue;
            score(index, keys, num_key_tiles);
            if (shape.soft_cap > 0) cap_scores();
            if (!sees_all(tiles[index], first)) hide_unseen(tiles[index], first);
            weigh(index);
            add_values(index, (count + tile_tokens - 1) / tile_tokens);
        }
    }

    void run() {
        for (int64_t index = 0; index < num_tiles; index++) start_tile(index);
        for (int64_t first = piece.first_key; first < piece.end_key; first += key_step) step(first);
        for (int64_t index = 0; index < num_tiles; index++) end_tile(index);
    }

    void end_tile(int64_t index) {
        const QueryTile& tile = tiles[index];
        const bool whole = piece.part == nullptr;
        const __m512 factor = whole ? _mm512_div_ps(_mm512_set1_ps(1), tile.weight_sum) : _mm512_set1_ps(1);
        for (int64_t dim = 0; dim < dims; dim += tile_rows) {
            __m512i lines[tile_rows];
            const float* const from = sums + (index * dims + dim) * tile_rows;
            for (int64_t i = 0; i < tile_rows; i++) {
                lines[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(from + i * tile_rows), factor));
            }
            transpose(lines);  // [16 queries][16 dims]
            for (int64_t lane = 0; lane < tile_rows && index * tile_rows + lane < rows; lane++) {
                put(index * tile_rows + lane, dim, {_mm512_castsi512_ps(lines[lane])});
            }
        }
        if (!whole) keep_part_heads(index);
    }

    void put(int64_t row, int64_t dim, Lanes items) const {
        if (piece.part != nullptr) return store(piece.part + row * (2 + dims) + 2 + dim, items);
        const int64_t place = row / shape.share * shape.output_stride + row % shape.share * dims + dim;
        if (shape.output_kind == Kind::bfloat16) return store(static_cast<BFloat16*>(piece.output) + place, items);
        store(static_cast<float*>(piece.output) + place, items);
    }

    void keep_part_heads(int64_t index) const {
        float largest_scores[tile_rows], weight_sums[tile_rows];
        _mm512_storeu_ps(largest_scores, _mm512_mul_ps(tiles[index].largest, _mm512_set1_ps(shape.scale)));
        _mm512_storeu_ps(weight_sums, tiles[index].weight_sum);
        for (int64_t lane = 0; lane < tile_rows && index * tile_rows + lane < rows; lane++) {
            float* const to = piece.part + (index * tile_rows + lane) * (2 + dims);
            to[0] = largest_scores[lane];
            to[1] = weight_sums[lane];
        }
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
