// Sixteen floats in two registers of AVX2, with FMA and F16C.
#pragma once

#include <immintrin.h>

#include "items.h"

namespace tandem::TANDEM_ISA_NAMESPACE {

struct Lanes {
    __m256 a, b;
};

inline Lanes all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Lanes add(Lanes x, Lanes y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Lanes subtract(Lanes x, Lanes y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Lanes multiply(Lanes x, Lanes y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Lanes divide(Lanes x, Lanes y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Lanes max(Lanes x, Lanes y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Lanes min(Lanes x, Lanes y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Lanes fma(Lanes x, Lanes y, Lanes z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Lanes round(Lanes x) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, nearest), _mm256_round_ps(x.b, nearest)};
}
inline __m256 power_of_two(__m256 power) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(power), _mm256_set1_epi32(127)), 23));
}
inline Lanes scale_by_power_of_two(Lanes x, Lanes power) {
    return {_mm256_mul_ps(x.a, power_of_two(power.a)), _mm256_mul_ps(x.b, power_of_two(power.b))};
}
inline Lanes zero_where_less(Lanes x, Lanes y, Lanes bound) {
    return {_mm256_and_ps(x.a, _mm256_cmp_ps(y.a, bound.a, _CMP_NLT_UQ)),
            _mm256_and_ps(x.b, _mm256_cmp_ps(y.b, bound.b, _CMP_NLT_UQ))};
}
inline float sum(Lanes x) {
    const __m256 eight = _mm256_add_ps(x.a, x.b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float largest(Lanes x) {
    const __m256 eight = _mm256_max_ps(x.a, x.b);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

// Bit i is set where lane i is at least that of the bound; not for a NaN.
inline uint32_t bits_not_below(Lanes x, Lanes bound) {
    const int low = _mm256_movemask_ps(_mm256_cmp_ps(x.a, bound.a, _CMP_GE_OQ));
    const int high = _mm256_movemask_ps(_mm256_cmp_ps(x.b, bound.b, _CMP_GE_OQ));
    return static_cast<uint32_t>(low | high << 8);
}

// Sixteen sums in double precision, of which two and two are already added.
struct Sums {
    __m256d a = _mm256_setzero_pd(), b = _mm256_setzero_pd();
};
inline __m256d pairs_of(__m256 eight) {
    return _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(eight)),
                         _mm256_cvtps_pd(_mm256_extractf128_ps(eight, 1)));
}
inline Sums operator+(Sums sums, Lanes x) {
    return {_mm256_add_pd(sums.a, pairs_of(x.a)), _mm256_add_pd(sums.b, pairs_of(x.b))};
}
inline double total(Sums sums) {
    const __m256d four = _mm256_add_pd(sums.a, sums.b);
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

inline __m128i load_eight(const void* items) { return _mm_loadu_si128(static_cast<const __m128i*>(items)); }
inline __m256 widened(__m128i bfloats) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bfloats), 16));
}
inline Lanes load(const float* items) { return {_mm256_loadu_ps(items), _mm256_loadu_ps(items + 8)}; }
inline Lanes load(const BFloat16* items) { return {widened(load_eight(items)), widened(load_eight(items + 8))}; }
inline Lanes load(const Float16* items) {
    return {_mm256_cvtph_ps(load_eight(items)), _mm256_cvtph_ps(load_eight(items + 8))};
}

// Rounds to nearest, ties to even; a NaN stays one. [8] of 32 bits, the number in the lower half.
inline __m256i narrowed(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256 nan = _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_set1_epi32(0x400000)));
    const __m256 kept = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_castps_si256(kept), 16);
}
inline void store(float* items, Lanes x) {
    _mm256_storeu_ps(items, x.a);
    _mm256_storeu_ps(items + 8, x.b);
}
inline void store(BFloat16* items, Lanes x) {
    const __m256i packed = _mm256_packus_epi32(narrowed(x.a), narrowed(x.b));  // interleaved by halves
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(items), _mm256_permute4x64_epi64(packed, 0b11011000));
}
inline void store(Float16* items, Lanes x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(items), _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(items + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}

inline __m256i load_pairs(const BFloat16* items) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(items)); }

// Of 16 pairs of bfloat16 the first, and the second, of each.
inline Lanes load_first_of_pairs(const BFloat16* items) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(load_pairs(items), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(load_pairs(items + 16), 16))};
}
inline Lanes load_second_of_pairs(const BFloat16* items) {
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000));
    return {_mm256_castsi256_ps(_mm256_and_si256(load_pairs(items), high)),
            _mm256_castsi256_ps(_mm256_and_si256(load_pairs(items + 16), high))};
}

// Sixteen words of 32 bits.
struct Words {
    __m256i a, b;
};

inline Words load_words(const void* words) {
    const __m256i* const halves = static_cast<const __m256i*>(words);
    return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
inline Words shifted_right(Words x, int count) {
    return {_mm256_srli_epi32(x.a, count), _mm256_srli_epi32(x.b, count)};
}
inline __m256i turned_by_16(__m256i x) { return _mm256_or_si256(_mm256_srli_epi32(x, 16), _mm256_slli_epi32(x, 16)); }
inline Words turned_by_16(Words x) { return {turned_by_16(x.a), turned_by_16(x.b)}; }

// Four bits each of two pairs of words of 16 bits, the lowest of the first pair's two words first: a lane has its own in
// bits 0–3, and others above.
inline __m256i spread_nibbles(const char* pair) {
    int bits;
    memcpy(&bits, pair, sizeof(bits));
    return _mm256_srlv_epi32(_mm256_set1_epi32(bits), _mm256_setr_epi32(0, 16, 4, 20, 8, 24, 12, 28));
}
inline Words spread_nibbles(const char* first_pair, const char* second_pair) {
    return {spread_nibbles(first_pair), spread_nibbles(second_pair)};
}
inline __m128i load_eight_bytes(const void* items) { return _mm_loadl_epi64(static_cast<const __m128i*>(items)); }
inline Lanes load(const uint8_t* items) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(load_eight_bytes(items))),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(load_eight_bytes(items + 8)))};
}
inline Lanes load(const int8_t* items) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_eight_bytes(items))),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_eight_bytes(items + 8)))};
}

// The numbers of 4, 5 or 6 bits, less the centre: of `low` bits 0–3, of `high` bits 4 and 5.
template <int bits, int centre>
inline __m256 numbers_of(__m256i low, __m256i high) {
    __m256i codes = _mm256_and_si256(low, _mm256_set1_epi32(15));
    if constexpr (bits > 4) {
        codes = _mm256_or_si256(codes, _mm256_and_si256(high, _mm256_set1_epi32((1 << bits) - 16)));
    }
    if constexpr (centre > 0) codes = _mm256_sub_epi32(codes, _mm256_set1_epi32(centre));
    return _mm256_cvtepi32_ps(codes);
}
template <int bits, int centre>
inline Lanes numbers_of(Words low, Words high) {
    return {numbers_of<bits, centre>(low.a, high.a), numbers_of<bits, centre>(low.b, high.b)};
}

// Of 16 numbers the first 8, and the last, each twice.
inline Lanes twice(__m256 x) {
    return {_mm256_permutevar8x32_ps(x, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3)),
            _mm256_permutevar8x32_ps(x, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7))};
}
inline Lanes first_half_twice(Lanes x) { return twice(x.a); }
inline Lanes last_half_twice(Lanes x) { return twice(x.b); }

// Of 16 pairs in two registers the first, and the second, of each.
template <int places>
inline __m256 some_of_pairs(Lanes x) {
    const __m256 by_quarters = _mm256_shuffle_ps(x.a, x.b, places);
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(by_quarters), 0b11011000));
}
inline Lanes firsts(Lanes x, Lanes y) { return {some_of_pairs<0b10001000>(x), some_of_pairs<0b10001000>(y)}; }
inline Lanes seconds(Lanes x, Lanes y) { return {some_of_pairs<0b11011101>(x), some_of_pairs<0b11011101>(y)}; }

inline void store(BFloat16* items, Lanes x, Lanes y) {
    store(items, x);
    store(items + 16, y);
}

}  // namespace tandem::TANDEM_ISA_NAMESPACE
