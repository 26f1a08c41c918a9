// Squares of 16 by 16 words of 32 bits, and of 4 by 4 quarters of a line, turned in registers.
#pragma once

#include <immintrin.h>

namespace tandem::TANDEM_ISA_NAMESPACE {

inline void transpose_quarters(__m512i (&lines)[4]) {
    const __m512i upper_even = _mm512_shuffle_i32x4(lines[0], lines[1], 0x88);
    const __m512i upper_odd = _mm512_shuffle_i32x4(lines[0], lines[1], 0xdd);
    const __m512i lower_even = _mm512_shuffle_i32x4(lines[2], lines[3], 0x88);
    const __m512i lower_odd = _mm512_shuffle_i32x4(lines[2], lines[3], 0xdd);
    lines[0] = _mm512_shuffle_i32x4(upper_even, lower_even, 0x88);
    lines[1] = _mm512_shuffle_i32x4(upper_odd, lower_odd, 0x88);
    lines[2] = _mm512_shuffle_i32x4(upper_even, lower_even, 0xdd);
    lines[3] = _mm512_shuffle_i32x4(upper_odd, lower_odd, 0xdd);
}

// Pairs of words, then pairs of pairs, within each quarter of a line; then the quarters change places, twice.
inline void transpose(__m512i (&lines)[16]) {
    __m512i turned[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        turned[i] = _mm512_unpacklo_epi32(lines[i], lines[i + 1]);
        turned[i + 1] = _mm512_unpackhi_epi32(lines[i], lines[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        lines[i] = _mm512_unpacklo_epi64(turned[i], turned[i + 2]);
        lines[i + 1] = _mm512_unpackhi_epi64(turned[i], turned[i + 2]);
        lines[i + 2] = _mm512_unpacklo_epi64(turned[i + 1], turned[i + 3]);
        lines[i + 3] = _mm512_unpackhi_epi64(turned[i + 1], turned[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512i quarters[4] = {lines[i], lines[i + 4], lines[i + 8], lines[i + 12]};
        transpose_quarters(quarters);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) turned[i + 4 * j] = quarters[j];
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) lines[i] = turned[i];
}

}  // namespace tandem::TANDEM_ISA_NAMESPACE
