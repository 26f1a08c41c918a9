#include "sampling_survivors.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "kernels.h"

namespace tandem {
namespace {

// Below the bound by more than a division by a temperature can round away.
float with_room(double bound) {
    const double lower = bound - std::fabs(bound) * 0x1p-20 - 0x1p-100;
    return static_cast<float>(std::max(lower, -static_cast<double>(FLT_MAX)));
}

void find(const Logits& logits, float temperature, double bound, SamplingMemory& memory) {
    Survivors& found = memory.survivors;
    found.fit(logits.count);
    found.count = kernels().sampling.find(logits.items, logits.count, with_room(bound), temperature, found.ids.data(),
                                          found.scaled.data());
}

void keep(const Cut& cut, Survivors& survivors) {
    int64_t kept = 0, num_equal = cut.num_equal;
    for (int64_t i = 0; i < survivors.count; i++) {
        const float scaled = survivors.scaled[i];
        survivors.ids[kept] = survivors.ids[i];
        survivors.scaled[kept] = scaled;
        kept += scaled > cut.least || (scaled == cut.least && num_equal-- > 0);
    }
    survivors.count = kept;
}

void empty_beyond(const Cut& cut, Survivors& survivors) {
    kernels().sampling.drop_below(survivors.scaled.data(), survivors.weights.data(), survivors.count, cut.least);
    int64_t surplus = cut.num_surplus;
    for (int64_t i = survivors.count - 1; surplus > 0; i--) {
        if (survivors.scaled[i] != cut.least) continue;
        survivors.weights[i] = 0;
        surplus--;
    }
}

double sum_of(const std::vector<double>& sums) {
    double total = 0;
    for (const double sum : sums) total += sum;
    return total;
}

}  // namespace

void Survivors::fit(int64_t most) {
    const size_t room = static_cast<size_t>(most + room_beyond);
    if (ids.size() < room) ids.resize(room), scaled.resize(room), weights.resize(room);
}

SamplingMemory& SamplingMemory::of_this_thread() {
    static thread_local SamplingMemory memory;
    return memory;
}

float find_peaks(const Logits& logits, SamplingMemory& memory) {
    memory.peaks.resize(num_peaks(logits.count));
    kernels().sampling.peaks(logits.items, logits.count, memory.peaks.data());
    const int64_t count = static_cast<int64_t>(memory.peaks.size());
    return kernels().sampling.range(memory.peaks.data(), count).most;
}

double sum_weights(const Logits& logits, const Softmax& softmax, SamplingMemory& memory) {
    memory.sums.resize(num_sums(logits.count));
    kernels().sampling.sum_weights(logits.items, logits.count, softmax, memory.sums.data());
    return sum_of(memory.sums);
}

double sum_survivors(SamplingMemory& memory) {
    memory.sums.resize(num_sums(memory.survivors.count));
    kernels().sampling.sum_runs(memory.survivors.weights.data(), memory.survivors.count, memory.sums.data());
    return sum_of(memory.sums);
}

// Where so many peaks lie above a bound, so many logits do.
void keep_top(const Logits& logits, float temperature, int64_t count, SamplingMemory& memory) {
    const int64_t num_peaks = static_cast<int64_t>(memory.peaks.size());
    const double target = static_cast<double>(count);
    memory.counted.set(memory.peaks.data(), nullptr, num_peaks);
    find(logits, temperature, count <= num_peaks ? memory.counted.cut_at(target).least : -FLT_MAX, memory);
    if (memory.survivors.count <= count) return;
    memory.counted.set(memory.survivors.scaled.data(), nullptr, memory.survivors.count);
    keep(memory.counted.cut_at(target), memory.survivors);
}

// Where the peaks above a bound weigh what the nucleus does, no token below it is in the nucleus. Nor is one that weighs
// less than (1 - top_p) total / n: together these are less than what is left out. Half of that is far from every
// rounding.
void keep_nucleus_and_more(const Logits& logits, const Softmax& softmax, double top_p, double total,
                           SamplingMemory& memory) {
    const int64_t num_peaks = static_cast<int64_t>(memory.peaks.size());
    memory.peak_weights.resize(memory.peaks.size());
    kernels().sampling.weigh(memory.peaks.data(), num_peaks, softmax, memory.peak_weights.data());
    memory.counted.set(memory.peaks.data(), memory.peak_weights.data(), num_peaks);
    const double least = std::max((1 - top_p) * total / static_cast<double>(logits.count), DBL_MIN) / 2;
    double bound = (softmax.most + std::log(least)) * softmax.temperature;
    const double target = top_p * total;
    if (memory.counted.total() >= target) bound = std::max<double>(bound, memory.counted.cut_at(target).least);
    find(logits, softmax.temperature, bound, memory);
}

void weigh(const Softmax& softmax, Survivors& survivors) {
    const Softmax scaled = {1, softmax.most, softmax.least};
    kernels().sampling.weigh(survivors.scaled.data(), survivors.count, scaled, survivors.weights.data());
}

void empty_beyond_nucleus(double top_p, double total, SamplingMemory& memory) {
    const Survivors& survivors = memory.survivors;
    memory.counted.set(survivors.scaled.data(), survivors.weights.data(), survivors.count);
    empty_beyond(memory.counted.cut_at(top_p * total), memory.survivors);
}

}  // namespace tandem
