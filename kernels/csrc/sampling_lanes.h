// What sampling does to every logit of a row.
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

// The places of the set bits, in rising order.
inline int64_t append(int32_t first, uint32_t bits, int32_t* result) {
#if defined(__AVX512F__)
    const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i places = _mm512_add_epi32(_mm512_set1_epi32(first), steps);
    _mm512_storeu_si512(result, _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), places));
    return __builtin_popcount(bits);
#else
    int64_t found = 0;
    for (; bits != 0; bits &= bits - 1) result[found++] = first + __builtin_ctz(bits);
    return found;
#endif
}

inline int64_t ids_not_below(const float* logits, int64_t count, float bound, int32_t* result) {
    int64_t found = 0, i = 0;
    for (; i + num_lanes <= count; i += num_lanes) {
        const uint32_t bits = bits_not_below(load(logits + i), all(bound));
        if (bits != 0) found += append(static_cast<int32_t>(i), bits, result + found);
    }
    for (; i < count; i++) {
        if (logits[i] >= bound) result[found++] = static_cast<int32_t>(i);
    }
    return found;
}

inline Lanes weights(Lanes logits, const Softmax& softmax) {
    const Lanes weight = exp(logits / all(softmax.temperature) - all(softmax.most));
    return zero_where_less(weight, weight, all(softmax.least));
}

inline void weigh(const float* logits, int64_t count, const Softmax& softmax, float* result) {
    for (int64_t i = 0; i < count; i += num_lanes) {
        store_some(result + i, count - i, weights(load_some(logits + i, count - i), softmax));
    }
}

inline void sum_weights(const float* logits, int64_t count, const Softmax& softmax, double* result) {
    for (int64_t start = 0; start < count; start += sum_run, result++) {
        const int64_t end = start + sum_run < count ? start + sum_run : count;
        Sums sums;
        int64_t i = start;
        for (; i + num_lanes <= end; i += num_lanes) sums = sums + weights(load(logits + i), softmax);
        float rest[num_lanes] = {};
        weigh(logits + i, end - i, softmax, rest);
        *result = total(sums + load(rest));
    }
}

}  // namespace tandem::TANDEM_ISA_NAMESPACE
