// What sampling does to every logit of a row, for one instruction set. All else it does to the few that are left.
#pragma once

#include <cstdint>

namespace tandem {

// A logit's weight is exp(logit / temperature - most), so that the likeliest token's is 1; 0 if that is below `least`.
struct Softmax {
    float temperature;
    float most;  // the largest logit / temperature
    float least;
};

constexpr int64_t peak_run = 512;   // logits that 16 peaks stand for, one for every 16th
constexpr int64_t sum_run = 1024;  // logits of one sum

constexpr int64_t num_peaks(int64_t count) { return (count + peak_run - 1) / peak_run * 16; }
constexpr int64_t num_sums(int64_t count) { return (count + sum_run - 1) / sum_run; }

struct SamplingKernels {
    // The largest of each 32 logits [num_peaks(count)]; never NaN, and the lowest float where no logit is above it.
    void (*peaks)(const float* logits, int64_t count, float* result);

    // Which logits are at least the bound: their places in rising order, in memory for 16 more. Returns how many.
    int64_t (*ids_not_below)(const float* logits, int64_t count, float bound, int32_t* result);

    void (*weigh)(const float* logits, int64_t count, const Softmax&, float* result);

    // The weights' sums [num_sums(count)], each of a run.
    void (*sum_weights)(const float* logits, int64_t count, const Softmax&, double* result);
};

}  // namespace tandem
