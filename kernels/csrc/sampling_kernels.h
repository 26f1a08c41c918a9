// What sampling does to many numbers at once, for one instruction set.
#pragma once

#include <cstdint>

namespace tandem {

// A logit's weight is exp(logit / temperature - most), so that the likeliest token's is 1; 0 if that is below `least`.
struct Softmax {
    float temperature;
    float most;  // the largest logit / temperature, finite
    float least;
};

struct Range {
    float least, most;
};

constexpr int64_t peak_run = 512;  // logits that 16 peaks stand for, each for every 16th
constexpr int64_t sum_run = 1024;  // numbers of one sum
constexpr int64_t room_beyond = 16;  // numbers that may be written past the last

constexpr int64_t num_peaks(int64_t count) { return (count + peak_run - 1) / peak_run * 16; }
constexpr int64_t num_sums(int64_t count) { return (count + sum_run - 1) / sum_run; }

struct SamplingKernels {
    // The largest of each 32 logits [num_peaks(count)]; never NaN, and the lowest float where no logit is above it.
    void (*peaks)(const float* logits, int64_t count, float* result);

    // Tokens whose logits are at least the bound, in rising order, and their logits / temperature, finite if only the
    // bound is. Both need `room_beyond`. Returns how many.
    int64_t (*find)(const float* logits, int64_t count, float bound, float temperature, int32_t* ids, float* scaled);

    void (*weigh)(const float* logits, int64_t count, const Softmax&, float* result);

    // The sums [num_sums(count)] of runs of the logits' weights, and of numbers.
    void (*sum_weights)(const float* logits, int64_t count, const Softmax&, double* result);
    void (*sum_runs)(const float* numbers, int64_t count, double* result);

    // Of at least one number.
    Range (*range)(const float* numbers, int64_t count);

    // The amounts of those numbers that are at least the bound.
    double (*sum_not_below)(const float* numbers, const float* amounts, int64_t count, float bound);

    // The amounts of numbers below the bound become 0.
    void (*drop_below)(const float* numbers, float* amounts, int64_t count, float bound);

    // Moves the numbers in [low, high), and their amounts, to the front in their order. Returns how many.
    int64_t (*keep_between)(float* numbers, float* amounts, int64_t count, float low, float high);
};

}  // namespace tandem
