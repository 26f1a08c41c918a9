#include <algorithm>
#include <cmath>

#include "sampling.h"

namespace tandem {
namespace {

// Those of no probability, the lower ids first, where there are not enough others.
void fill_up(const Logits& logits, int64_t count, std::vector<int32_t>& ids) {
    for (int32_t id = 0; static_cast<int64_t>(ids.size()) < count; id++) {
        if (!(logits.items[id] > -INFINITY)) ids.push_back(id);
    }
}

}  // namespace

void find_logprobs(const Logits& logits, int64_t chosen, SamplingMemory& memory, Logprobs& result) {
    const float most = find_peaks(logits, memory);
    const double normaliser = most + std::log(sum_weights(logits, {1, most, 0}, memory));
    result.chosen = logits.items[chosen] - normaliser;
    if (result.count == 0) return;
    keep_top(logits, 1, result.count, memory);
    std::vector<int32_t>& ids = memory.survivors.ids;
    const auto likelier = [&](int32_t a, int32_t b) { return logits.items[a] > logits.items[b]; };
    std::stable_sort(ids.begin(), ids.end(), likelier);
    fill_up(logits, result.count, ids);
    for (int64_t i = 0; i < result.count; i++) {
        result.ids[i] = ids[i];
        result.logprobs[i] = logits.items[ids[i]] - normaliser;
    }
}

}  // namespace tandem
