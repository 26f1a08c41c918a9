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

// The run of numbers that the target lies in, and what those before it amount to.
struct Run {
    int64_t start;
    int64_t count;
    double before;
};

Run run_of(double target, const std::vector<double>& sums, int64_t count) {
    double before = 0;
    size_t run = 0;
    for (; run + 1 < sums.size() && before + sums[run] <= target; run++) before += sums[run];
    const int64_t start = static_cast<int64_t>(run) * sum_run;
    return {start, std::min(sum_run, count - start), before};
}

// Only the target's run is weighed again.
int64_t draw_from_all(const Logits& logits, const Softmax& softmax, double uniform, SamplingMemory& memory) {
    const double target = target_of(uniform, sum_weights(logits, softmax, memory));
    const Run run = run_of(target, memory.sums, logits.count);
    float weights[sum_run];
    kernels().sampling.weigh(logits.items + run.start, run.count, softmax, weights);
    return run.start + pick(weights, run.count, run.before, target);
}

int64_t draw_from_survivors(double uniform, SamplingMemory& memory) {
    const Survivors& survivors = memory.survivors;
    const double target = target_of(uniform, sum_survivors(memory));
    const Run run = run_of(target, memory.sums, survivors.count);
    return survivors.ids[run.start + pick(survivors.weights.data() + run.start, run.count, run.before, target)];
}

int64_t draw_from_top(const Logits& logits, const Softmax& softmax, const Choice& choice, SamplingMemory& memory) {
    keep_top(logits, softmax.temperature, choice.top_k, memory);
    weigh(softmax, memory.survivors);
    if (choice.top_p < 1) empty_beyond_nucleus(choice.top_p, sum_survivors(memory), memory);
    return draw_from_survivors(choice.uniform, memory);
}

int64_t draw_from_nucleus(const Logits& logits, const Softmax& softmax, const Choice& choice, SamplingMemory& memory) {
    const double total = sum_weights(logits, softmax, memory);
    keep_nucleus_and_more(logits, softmax, choice.top_p, total, memory);
    weigh(softmax, memory.survivors);
    empty_beyond_nucleus(choice.top_p, total, memory);
    return draw_from_survivors(choice.uniform, memory);
}

}  // namespace

int64_t choose(const Logits& logits, const Choice& choice, SamplingMemory& memory) {
    if (choice.temperature == 0) return kernels().largest(logits.items, logits.count);
    const float most = find_peaks(logits, memory);
    const Softmax softmax = {choice.temperature, most / choice.temperature, choice.min_p};
    if (most == -FLT_MAX || !std::isfinite(softmax.most)) return kernels().largest(logits.items, logits.count);
    if (choice.top_k > 0 && choice.top_k < logits.count) return draw_from_top(logits, softmax, choice, memory);
    if (choice.top_p < 1) return draw_from_nucleus(logits, softmax, choice, memory);
    return draw_from_all(logits, softmax, choice.uniform, memory);
}

}  // namespace tandem
