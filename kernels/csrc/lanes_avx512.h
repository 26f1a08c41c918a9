// Sixteen floats in one register of AVX-512.
#pragma once

#include <immintrin.h>

#include "items.h"

namespace tandem::TANDEM_ISA_NAMESPACE {

struct Lanes {
    __m512 v;
};

inline Lanes all(float value) { return {_mm512_set1_ps(value)}; }
inline Lanes add(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes subtract(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Lanes multiply(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes divide(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Lanes max(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Lanes min(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Lanes round(Lanes a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Lanes scale_by_power_of_two(Lanes a, Lanes power) { return {_mm512_scalef_ps(a.v, power.v)}; }
inline Lanes zero_where_less(Lanes a, Lanes x, Lanes bound) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, bound.v, _CMP_NLT_UQ), a.v)};
}
inline float sum(Lanes a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Lanes a) { return _mm512_reduce_max_ps(a.v); }

// Bit i is set where lane i is at least that of the bound; not for a NaN.
inline uint32_t bits_not_below(Lanes a, Lanes bound) { return _mm512_cmp_ps_mask(a.v, bound.v, _CMP_GE_OQ); }

// Sixteen sums in double precision.
struct Sums {
    __m512d a = _mm512_setzero_pd(), b = _mm512_setzero_pd();
};
inline Sums operator+(Sums sums, Lanes x) {
    const __m256 low = _mm512_castps512_ps256(x.v), high = _mm512_extractf32x8_ps(x.v, 1);
    return {_mm512_add_pd(sums.a, _mm512_cvtps_pd(low)), _mm512_add_pd(sums.b, _mm512_cvtps_pd(high))};
}
inline double total(Sums sums) { return _mm512_reduce_add_pd(_mm512_add_pd(sums.a, sums.b)); }

inline __m512 widened(__m256i bfloats) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bfloats), 16));
}
inline Lanes load(const float* items) { return {_mm512_loadu_ps(items)}; }
inline Lanes load(const BFloat16* items) {
    return {widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(items)))};
}
inline Lanes load(const Float16* items) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(items)))};
}

// Rounds to nearest, ties to even; a NaN stays one.
inline __m256i narrowed(__m512 a) {
#if defined(__AVX512BF16__)
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a));
#else
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
#endif
}
inline void store(float* items, Lanes a) { _mm512_storeu_ps(items, a.v); }
inline void store(BFloat16* items, Lanes a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(items), narrowed(a.v));
}
inline void store(Float16* items, Lanes a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(items), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

// Of 16 pairs of bfloat16 the first, and the second, of each.
inline Lanes load_first_of_pairs(const BFloat16* items) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(items), 16))};
}
inline Lanes load_second_of_pairs(const BFloat16* items) {
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(items), high))};
}

// Sixteen words of 32 bits.
struct Words {
    __m512i v;
};

inline Words load_words(const void* words) { return {_mm512_loadu_si512(words)}; }
inline Words shifted_right(Words a, int count) { return {_mm512_srli_epi32(a.v, count)}; }
inline Words turned_by_16(Words a) { return {_mm512_rol_epi32(a.v, 16)}; }

// Four bits each of two pairs of words of 16 bits, the lowest of the first pair's two words first: a lane has its own in
// bits 0–3, and others above.
inline __m512i all_words(const char* word) {
    int bits;
    memcpy(&bits, word, sizeof(bits));
    return _mm512_set1_epi32(bits);
}
inline Words spread_nibbles(const char* first_pair, const char* second_pair) {
    const __m512i both = _mm512_mask_blend_epi32(0xff00, all_words(first_pair), all_words(second_pair));
    return {_mm512_srlv_epi32(both, _mm512_setr_epi32(0, 16, 4, 20, 8, 24, 12, 28, 0, 16, 4, 20, 8, 24, 12, 28))};
}
inline Lanes load(const uint8_t* items) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(items))))};
}
inline Lanes load(const int8_t* items) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(items))))};
}

#if defined(__AVX512VBMI__)
// 2^15 + a byte: its bits are the second byte of a float.
inline Lanes bytes_above_32768(const uint8_t* items) {
    const __m512i places = _mm512_setr_epi32(0x000, 0x100, 0x200, 0x300, 0x400, 0x500, 0x600, 0x700, 0x800, 0x900, 0xa00,
                                             0xb00, 0xc00, 0xd00, 0xe00, 0xf00);
    const __m512i bytes = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(items)));
    return {_mm512_castsi512_ps(
        _mm512_mask_permutexvar_epi8(_mm512_set1_epi32(0x47000000), 0x2222222222222222, places, bytes))};
}
#endif

template <int first>
inline __m512 numbers_from() {
    return _mm512_setr_ps(first, first + 1, first + 2, first + 3, first + 4, first + 5, first + 6, first + 7, first + 8,
                          first + 9, first + 10, first + 11, first + 12, first + 13, first + 14, first + 15);
}

// The numbers of 4, 5 or 6 bits, less the centre: of `low` bits 0–3, of `high` bits 4 and 5. Looked up, the first two
// need neither masks nor conversion.
template <int bits, int centre>
inline Lanes numbers_of(Words low, Words high) {
    if constexpr (bits == 4) return {_mm512_permutexvar_ps(low.v, numbers_from<-centre>())};
    const __m512i joined = _mm512_ternarylogic_epi32(_mm512_set1_epi32(15), low.v, high.v, 0xca);  // low where set
    if constexpr (bits == 5) {
        return {_mm512_permutex2var_ps(numbers_from<-centre>(), joined, numbers_from<16 - centre>())};
    }
    const __m512i masked = _mm512_and_si512(joined, _mm512_set1_epi32(63));
    static_assert(bits < 6 || centre == 0);
    return {_mm512_cvtepi32_ps(masked)};
}

// Of 16 numbers the first 8, and the last, each twice.
inline Lanes first_half_twice(Lanes a) {
    return {_mm512_permutexvar_ps(_mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7), a.v)};
}
inline Lanes last_half_twice(Lanes a) {
    return {_mm512_permutexvar_ps(_mm512_setr_epi32(8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15), a.v)};
}

// Of 16 pairs in two registers the first, and the second, of each.
inline Lanes firsts(Lanes a, Lanes b) {
    const __m512i places = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return {_mm512_permutex2var_ps(a.v, places, b.v)};
}
inline Lanes seconds(Lanes a, Lanes b) {
    const __m512i places = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return {_mm512_permutex2var_ps(a.v, places, b.v)};
}

inline void store(BFloat16* items, Lanes a, Lanes b) {
#if defined(__AVX512BF16__)
    _mm512_storeu_si512(items, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b.v, a.v)));
#else
    store(items, a);
    store(items + 16, b);
#endif
}

}  // namespace tandem::TANDEM_ISA_NAMESPACE
