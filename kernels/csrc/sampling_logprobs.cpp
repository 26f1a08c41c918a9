#include <algorithm>
#include <cmath>

#include "sampling.h"

namespace tandem {
namespace {

// Those of no probability, the lower ids first, where there are not enough others.
void fill_up(const Logits& logits, int64_t count, Survivors& survivors) {
    for (int32_t id = 0; survivors.count < count; id++) {
        if (!(logits.items[id] > -INFINITY)) survivors.ids[survivors.count++] = id;
    }
}

}  // namespace

void find_logprobs(const Logits& logits, int64_t chosen, SamplingMemory& memory, Logprobs& result) {
    const float most = find_peaks(logits, memory);
    const double log_sum = std::log(sum_weights(logits, {1, most, 0}, memory));
    const auto logprob = [&](int64_t id) { return static_cast<double>(logits.items[id]) - most - log_sum; };
    result.chosen = logprob(chosen);
    if (result.count == 0) return;
    keep_top(logits, 1, result.count, memory);
    const auto ids = memory.survivors.ids.begin();
    const auto likelier = [&](int32_t a, int32_t b) { return logits.items[a] > logits.items[b]; };
    std::stable_sort(ids, ids + memory.survivors.count, likelier);
    fill_up(logits, result.count, memory.survivors);
    for (int64_t i = 0; i < result.count; i++) {
        result.ids[i] = ids[i];
        result.logprobs[i] = logprob(ids[i]);
    }
}

}  // namespace tandem
