#include "sampling.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "kernels.h"

namespace tandem {
namespace {

// The first whose cumulative weight, from `before` on, is above the target; where rounding leaves none, the last that
// weighs anything.
int64_t pick(const float* weights, int64_t count, double before, double target) {
    int64_t last = 0;
    for (int64_t i = 0; i < count; i++) {
        if (weights[i] == 0) continue;
        last = i;
        before += weights[i];
        if (before > target) break;
    }
    return last;
}

double target_of(double uniform, double total) { return std::min(uniform * total, std::nextafter(total, 0.0)); }

// The run of the target is found by the runs' sums, and is all that is weighed again.
int64_t draw_from_all(const Logits& logits, const Softmax& softmax, double uniform, SamplingMemory& memory) {
    const double target = target_of(uniform, sum_weights(logits, softmax, memory));
    double before = 0;
    size_t run = 0;
    for (; run + 1 < memory.sums.size() && before + memory.sums[run] <= target; run++) before += memory.sums[run];
    const int64_t start = static_cast<int64_t>(run) * sum_run, count = std::min(sum_run, logits.count - start);
    float weights[sum_run];
    kernels().sampling.weigh(logits.items + start, count, softmax, weights);
    return start + pick(weights, count, before, target);
}

double weigh_survivors(const Softmax& softmax, Survivors& survivors) {
    weigh(softmax, survivors);
    double total = 0;
    for (const float weight : survivors.weights) total += weight;
    return total;
}

int64_t draw_from_survivors(const Survivors& survivors, double uniform) {
    double total = 0;
    for (const float weight : survivors.weights) total += weight;
    return survivors.ids[pick(survivors.weights.data(), survivors.count(), 0, target_of(uniform, total))];
}

bool limits(const Choice& choice, int64_t count) { return choice.top_k > 0 && choice.top_k < count; }

int64_t draw_from_some(const Logits& logits, const Softmax& softmax, const Choice& choice, SamplingMemory& memory) {
    double total;
    if (limits(choice, logits.count)) {
        keep_top(logits, softmax.temperature, choice.top_k, memory);
        total = weigh_survivors(softmax, memory.survivors);
    } else {
        total = sum_weights(logits, softmax, memory);
        keep_nucleus_and_more(logits, softmax, choice.top_p, total, memory);
        weigh(softmax, memory.survivors);
    }
    if (choice.top_p < 1) keep_nucleus(choice.top_p, total, memory);
    return draw_from_survivors(memory.survivors, choice.uniform);
}

}  // namespace

int64_t choose(const Logits& logits, const Choice& choice, SamplingMemory& memory) {
    if (choice.temperature == 0) return kernels().largest(logits.items, logits.count);
    const float most = find_peaks(logits, memory);
    const Softmax softmax = {choice.temperature, most / choice.temperature, choice.min_p};
    if (most == -FLT_MAX || !std::isfinite(softmax.most)) return kernels().largest(logits.items, logits.count);
    if (!limits(choice, logits.count) && choice.top_p >= 1) return draw_from_all(logits, softmax, choice.uniform, memory);
    return draw_from_some(logits, softmax, choice, memory);
}

}  // namespace tandem
