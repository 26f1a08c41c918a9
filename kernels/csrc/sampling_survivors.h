// The few tokens of a row that top-k or top-p leaves.
#pragma once

#include <cstdint>
#include <vector>

#include "sampling_cut.h"
#include "sampling_kernels.h"

namespace tandem {

struct Logits {
    const float* items;  // of one row
    int64_t count;
};

// In rising order of their ids. There is room for more than there are, since the first touch of new memory costs more
// than all the work.
struct Survivors {
    std::vector<int32_t> ids;
    std::vector<float> scaled;   // logit / temperature
    std::vector<float> weights;  // see Softmax
    int64_t count = 0;

    void fit(int64_t count);
};

// What a thread works in, and keeps.
struct SamplingMemory {
    std::vector<float> peaks, peak_weights;
    std::vector<double> sums;
    Counted counted;
    Survivors survivors;

    static SamplingMemory& of_this_thread();
};

// Fills in the peaks. Returns the largest; the lowest float where no logit is above it.
float find_peaks(const Logits&, SamplingMemory&);

// Fill in the sums of the weights, of every logit or of the survivors. Return the sum of all.
double sum_weights(const Logits&, const Softmax&, SamplingMemory&);
double sum_survivors(SamplingMemory&);

// Survivors without weights: the `count` likeliest, of equals the lower ids. Needs the peaks. Logits of minus infinity
// do not survive, so there may be fewer.
void keep_top(const Logits&, float temperature, int64_t count, SamplingMemory&);

// Survivors without weights: all that the share `top_p` of `total`, the sum of the weights, can reach, and more. Needs
// the peaks.
void keep_nucleus_and_more(const Logits&, const Softmax&, double top_p, double total, SamplingMemory&);

void weigh(const Softmax&, Survivors&);

// Takes the weights of what lies outside of the share `top_p` of `total`.
void empty_beyond_nucleus(double top_p, double total, SamplingMemory&);

}  // namespace tandem
