// Scores made into weights, for `width` queries at once: 16, a lane to each, or 4, whose scores for four keys share a
// register. Which of the two a query is among changes nothing in its numbers.
//
//     scores     [keys][width] floats
//     weights    [width][32 tokens] bfloat16, a tile for each 32 keys
#pragma once

#include <immintrin.h>

#include "key_step_amx.h"
#include "lanes.h"
#include "transpose_avx512.h"

namespace tandem::TANDEM_ISA_NAMESPACE {

// Two to the x, for weights that become bfloat16: to within 1e-4. Nothing is added up that would not vanish beside 1.
// Beside tiles one port of the processor does all arithmetic: the fewer instructions, the better.
inline __m512 coarse_exp2(__m512 x) {
    const __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - ⌊x⌋; of -∞ 0
    // The cubic whose largest error relative to 2^rest is least among those that give 2^0 as 1: a sum whose largest score
    // stays the same is scaled by just that.
    __m512 sum = _mm512_set1_ps(0.07706705f);
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.22764498f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(0.69511682f));
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(sum, x);  // times 2^⌊x⌋
}

// Scores into exponents of two, of which the largest is 0.
struct Exponent {
    __m512 factor, shift;

    __m512 weight(const float* scores) const {
        return coarse_exp2(_mm512_fmsub_ps(_mm512_load_ps(scores), factor, shift));
    }
};

constexpr int64_t narrow_width = 4;

template <int64_t width>
struct Weights;

template <>
struct Weights<tile_rows> {
    static constexpr int64_t line_keys = 1;

    static __m512i key_of_lane() { return _mm512_setzero_si512(); }
    static __m512 largest_of_keys(__m512 line) { return line; }
    // Of the keys that are i, modulo four.
    static __m512 total(const __m512 (&sums)[4]) {
        return _mm512_add_ps(_mm512_add_ps(sums[0], sums[2]), _mm512_add_ps(sums[1], sums[3]));
    }

    template <class Meanwhile>
    static void put(const float* scores, const Exponent& exponent, __m512 (&sums)[4], char* to, Meanwhile meanwhile) {
        __m512i pairs[tile_rows];
        for (int64_t i = 0; i < tile_rows; i += 2, scores += 4 * tile_rows) {
            meanwhile(2);
            pairs[i] = put_pair(scores, exponent, sums[0], sums[1]);
            pairs[i + 1] = put_pair(scores + 2 * tile_rows, exponent, sums[2], sums[3]);
        }
        transpose(pairs);  // to [16 queries][32 tokens]
        for (int64_t i = 0; i < tile_rows; i++) _mm512_store_si512(to + i * tile_row_bytes, pairs[i]);
    }

   private:
    static __m512i put_pair(const float* scores, const Exponent& exponent, __m512& first_sum, __m512& second_sum) {
        const __m512 first = exponent.weight(scores), second = exponent.weight(scores + tile_rows);
        first_sum = _mm512_add_ps(first_sum, first);
        second_sum = _mm512_add_ps(second_sum, second);
        return paired(first, second);
    }

    // Each lane's two numbers as bfloat16, the first in the lower half.
    static __m512i paired(__m512 first, __m512 second) {
        const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                                     22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        return _mm512_permutexvar_epi16(interleaved, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
    }
};

template <>
struct Weights<narrow_width> {
    static constexpr int64_t line_keys = num_lanes / narrow_width;

    static __m512i key_of_lane() { return _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3); }
    static __m512 largest_of_keys(__m512 line) {
        line = _mm512_max_ps(line, _mm512_shuffle_f32x4(line, line, halves));
        return _mm512_max_ps(line, _mm512_shuffle_f32x4(line, line, quarters));
    }
    // The first alone is used: its quarters are the four sums of the wide tile, and are added in its order.
    static __m512 total(const __m512 (&sums)[4]) {
        const __m512 twos = _mm512_add_ps(sums[0], _mm512_shuffle_f32x4(sums[0], sums[0], halves));
        return _mm512_add_ps(twos, _mm512_shuffle_f32x4(twos, twos, quarters));
    }

    template <class Meanwhile>
    static void put(const float* scores, const Exponent& exponent, __m512 (&sums)[4], char* to, Meanwhile meanwhile) {
        __m512i lines[4];  // of 8 tokens each
        for (int64_t i = 0; i < 4; i++, scores += 2 * num_lanes) {
            meanwhile(2);
            const __m512 first = exponent.weight(scores), second = exponent.weight(scores + num_lanes);
            sums[0] = _mm512_add_ps(_mm512_add_ps(sums[0], first), second);
            lines[i] = by_query(first, second);
        }
        transpose_quarters(lines);  // to [4 queries][32 tokens]
        for (int64_t i = 0; i < 4; i++) _mm512_store_si512(to + i * tile_row_bytes, lines[i]);
    }

   private:
    static constexpr int halves = 0x4e, quarters = 0xb1;  // change places

    // [8 tokens][4 queries] to [4 queries][8 tokens] bfloat16.
    static __m512i by_query(__m512 first, __m512 second) {
        const __m512i turned = _mm512_set_epi16(31, 27, 23, 19, 15, 11, 7, 3, 30, 26, 22, 18, 14, 10, 6, 2, 29, 25, 21, 17,
                                                13, 9, 5, 1, 28, 24, 20, 16, 12, 8, 4, 0);
        return _mm512_permutexvar_epi16(turned, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
    }
};

}  // namespace tandem::TANDEM_ISA_NAMESPACE
