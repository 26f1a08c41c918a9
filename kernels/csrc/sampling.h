// Choosing tokens from logits, and saying how likely they were.
#pragma once

#include "sampling_survivors.h"

namespace tandem {

// How a row chooses, in this order: temperature, min-p, top-k, top-p.
struct Choice {
    float temperature;  // 0: the likeliest token
    float min_p;        // of the likeliest token's weight; 0: all
    int64_t top_k;      // 0: all
    double top_p;       // 1: all
    double uniform;     // in [0, 1)
};

// The inverse of the cumulative weights, in order of token id. Of equals the lower id counts as likelier. A row whose
// largest number is infinite gives its first; one without a number gives 0.
int64_t choose(const Logits&, const Choice&, SamplingMemory&);

// Log-probabilities of one row.
struct Logprobs {
    double chosen;
    int64_t* ids;      // [count], likeliest first, of equals the lower id
    double* logprobs;  // [count]
    int64_t count;     // at most that of the logits
};

void find_logprobs(const Logits&, int64_t chosen, SamplingMemory&, Logprobs&);

}  // namespace tandem
