// What sampling does to many numbers at once.
#pragma once

#include <cfloat>

#include "lanes.h"
#include "sampling_kernels.h"

namespace tandem::TANDEM_ISA_NAMESPACE {

// `max` gives its second number where one is NaN.
inline void peaks(const float* logits, int64_t count, float* result) {
    for (int64_t start = 0; start < count; start += peak_run, result += num_lanes) {
        const int64_t end = start + peak_run < count ? start + peak_run : count;
        Lanes most = all(-FLT_MAX);
        int64_t i = start;
        for (; i + num_lanes <= end; i += num_lanes) most = max(load(logits + i), most);
        store(result, most);
        for (float* peak = result; i < end; i++, peak++) *peak = logits[i] > *peak ? logits[i] : *peak;
    }
}

// The lanes of the set bits, and `first` plus the places of these bits, one after the other.
#if defined(__AVX512F__)
inline void store_chosen(Lanes lanes, uint32_t bits, float* result) {
    _mm512_storeu_ps(result, _mm512_maskz_compress_ps(static_cast<__mmask16>(bits), lanes.v));
}
inline void store_places(int64_t first, uint32_t bits, int32_t* result) {
    const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i places = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)), steps);
    _mm512_storeu_si512(result, _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), places));
}
#else
inline void store_chosen(Lanes lanes, uint32_t bits, float* result) {
    float whole[num_lanes];
    store(whole, lanes);
    for (; bits != 0; bits &= bits - 1) *result++ = whole[__builtin_ctz(bits)];
}
inline void store_places(int64_t first, uint32_t bits, int32_t* result) {
    for (; bits != 0; bits &= bits - 1) *result++ = static_cast<int32_t>(first) + __builtin_ctz(bits);
}
#endif

inline uint32_t first_bits(int64_t count) { return count >= num_lanes ? 0xffff : (1u << count) - 1; }

inline int64_t find(const float* logits, int64_t count, float bound, float temperature, int32_t* ids, float* scaled) {
    int64_t found = 0;
    for (int64_t i = 0; i < count; i += num_lanes) {
        const Lanes some = load_some(logits + i, count - i);
        const uint32_t bits = bits_not_below(some, all(bound)) & first_bits(count - i);
        if (bits == 0) continue;
        store_places(i, bits, ids + found);
        store_chosen(max(some / all(temperature), all(-FLT_MAX)), bits, scaled + found);
        found += __builtin_popcount(bits);
    }
    return found;
}

// x / y, rounded as a division is, at a fraction of its cost (Markstein: Computation of elementary functions on the IBM
// RISC System/6000, 1990). `inverse`: 1 / y.
inline Lanes quotient(Lanes x, Lanes y, Lanes inverse) {
#if defined(__FMA__)
    const Lanes near = x * inverse;
    return fma(fma(all(0) - near, y, x), inverse, near);
#else
    (void)inverse;
    return x / y;
#endif
}

struct Weigher {
    Lanes temperature, inverse, most, least, lowest;

    // Far enough below the likeliest a weight is 0, and the quotient might not be finite.
    explicit Weigher(const Softmax& softmax)
        : temperature(all(softmax.temperature)),
          inverse(all(1.0f / softmax.temperature)),
          most(all(softmax.most)),
          least(all(softmax.least)),
          lowest(max(all((softmax.most - 100) * softmax.temperature), all(-FLT_MAX))) {}

    Lanes operator()(Lanes logits) const {
        const Lanes weight = exp(quotient(logits, temperature, inverse) - most);
        return zero_where_less(zero_where_less(weight, logits, lowest), weight, least);
    }
};

inline void weigh(const float* logits, int64_t count, const Softmax& softmax, float* result) {
    const Weigher weights(softmax);
    for (int64_t i = 0; i < count; i += num_lanes) {
        store_some(result + i, count - i, weights(load_some(logits + i, count - i)));
    }
}

inline void sum_weights(const float* logits, int64_t count, const Softmax& softmax, double* result) {
    const Weigher weights(softmax);
    for (int64_t start = 0; start < count; start += sum_run) {
        const int64_t end = start + sum_run < count ? start + sum_run : count;
        Sums sums;
        int64_t i = start;
        for (; i + num_lanes <= end; i += num_lanes) sums = sums + weights(load(logits + i));
        float rest[num_lanes] = {};
        weigh(logits + i, end - i, softmax, rest);
        *result++ = total(sums + load(rest));
    }
}

inline void sum_runs(const float* numbers, int64_t count, double* result) {
    for (int64_t start = 0; start < count; start += sum_run) {
        const int64_t end = start + sum_run < count ? start + sum_run : count;
        Sums sums;
        for (int64_t i = start; i < end; i += num_lanes) sums = sums + load_some(numbers + i, end - i);
        *result++ = total(sums);
    }
}

inline Range range(const float* numbers, int64_t count) {
    Lanes least = all(numbers[0]), most = least;
    int64_t i = 0;
    for (; i + num_lanes <= count; i += num_lanes) {
        const Lanes some = load(numbers + i);
        least = min(some, least), most = max(some, most);
    }
    for (; i < count; i++) least = min(all(numbers[i]), least), most = max(all(numbers[i]), most);
    return {-largest(all(0) - least), largest(most)};
}

inline double sum_not_below(const float* numbers, const float* amounts, int64_t count, float bound) {
    Sums sums;
    for (int64_t i = 0; i < count; i += num_lanes) {
        const Lanes some = load_some(numbers + i, count - i), amount = load_some(amounts + i, count - i);
        sums = sums + zero_where_less(amount, some, all(bound));
    }
    return total(sums);
}

inline void drop_below(const float* numbers, float* amounts, int64_t count, float bound) {
    for (int64_t i = 0; i < count; i += num_lanes) {
        const Lanes some = load_some(numbers + i, count - i), amount = load_some(amounts + i, count - i);
        store_some(amounts + i, count - i, zero_where_less(amount, some, all(bound)));
    }
}

// Never writes beyond what it has read.
inline int64_t keep_between(float* numbers, float* amounts, int64_t count, float low, float high) {
    int64_t kept = 0;
    for (int64_t i = 0; i < count; i += num_lanes) {
        const Lanes some = load_some(numbers + i, count - i), amount = load_some(amounts + i, count - i);
        const uint32_t bits = bits_not_below(some, all(low)) & ~bits_not_below(some, all(high)) & first_bits(count - i);
        store_chosen(some, bits, numbers + kept);
        store_chosen(amount, bits, amounts + kept);
        kept += __builtin_popcount(bits);
    }
    return kept;
}

}  // namespace tandem::TANDEM_ISA_NAMESPACE
