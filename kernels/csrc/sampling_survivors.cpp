#include "sampling_survivors.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "kernels.h"

namespace tandem {
namespace {

constexpr int64_t places_beyond = 16;  // that finding places may write

// Below the bound by more than a division by a temperature can round away.
float with_room(double bound) {
    const double lower = bound - std::fabs(bound) * 0x1p-20 - 0x1p-100;
    return static_cast<float>(std::max(lower, -static_cast<double>(FLT_MAX)));
}

void find(const Logits& logits, float temperature, double bound, SamplingMemory& memory) {
    const size_t needed = static_cast<size_t>(logits.count + places_beyond);
    if (memory.places.size() < needed) memory.places.resize(needed);
    int32_t* const places = memory.places.data();
    const int64_t count = kernels().sampling.ids_not_below(logits.items, logits.count, with_room(bound), places);
    Survivors& found = memory.survivors;
    found.ids.assign(places, places + count);
    found.scaled.resize(count);
    for (int64_t i = 0; i < count; i++) found.scaled[i] = std::max(logits.items[places[i]] / temperature, -FLT_MAX);
}

Cut cut_of(const std::vector<float>& numbers, const float* amounts, double target, SamplingMemory& memory) {
    memory.counted.resize(numbers.size());
    for (size_t i = 0; i < numbers.size(); i++) memory.counted[i] = {numbers[i], amounts ? amounts[i] : 1.0f};
    return cut_at(memory.counted, target);
}

void keep(const Cut& cut, Survivors& survivors) {
    const bool weighed = !survivors.weights.empty();
    size_t kept = 0;
    int64_t num_equal = cut.num_equal;
    for (size_t i = 0; i < survivors.ids.size(); i++) {
        const float scaled = survivors.scaled[i];
        if (scaled < cut.least || (scaled == cut.least && num_equal-- <= 0)) continue;
        survivors.ids[kept] = survivors.ids[i];
        survivors.scaled[kept] = scaled;
        if (weighed) survivors.weights[kept] = survivors.weights[i];
        kept++;
    }
    survivors.ids.resize(kept);
    survivors.scaled.resize(kept);
    survivors.weights.resize(weighed ? kept : 0);
}

}  // namespace

SamplingMemory& SamplingMemory::of_this_thread() {
    static thread_local SamplingMemory memory;
    return memory;
}

float find_peaks(const Logits& logits, SamplingMemory& memory) {
    memory.peaks.resize(num_peaks(logits.count));
    kernels().sampling.peaks(logits.items, logits.count, memory.peaks.data());
    return *std::max_element(memory.peaks.begin(), memory.peaks.end());
}

double sum_weights(const Logits& logits, const Softmax& softmax, SamplingMemory& memory) {
    memory.sums.resize(num_sums(logits.count));
    kernels().sampling.sum_weights(logits.items, logits.count, softmax, memory.sums.data());
    double total = 0;
    for (const double sum : memory.sums) total += sum;
    return total;
}

// As many logits as there are peaks at least as large lie above a peak.
void keep_top(const Logits& logits, float temperature, int64_t count, SamplingMemory& memory) {
    memory.survivors.weights.clear();
    const bool few = count <= static_cast<int64_t>(memory.peaks.size());
    const float bound = few ? cut_of(memory.peaks, nullptr, static_cast<double>(count), memory).least : -FLT_MAX;
    find(logits, temperature, bound, memory);
    if (memory.survivors.count() <= count) return;
    keep(cut_of(memory.survivors.scaled, nullptr, static_cast<double>(count), memory), memory.survivors);
}

// All weights below (1 - top_p) total / n together are less than what the nucleus leaves out, and so none is in it. Half
// of that is far from every rounding.
void keep_nucleus_and_more(const Logits& logits, const Softmax& softmax, double top_p, double total,
                           SamplingMemory& memory) {
    const double left_out = (1 - top_p) * total / static_cast<double>(logits.count);
    const double weight = std::max({left_out, static_cast<double>(softmax.least), DBL_MIN}) / 2;
    memory.survivors.weights.clear();
    find(logits, softmax.temperature, (softmax.most + std::log(weight)) * softmax.temperature, memory);
}

void weigh(const Softmax& softmax, Survivors& survivors) {
    survivors.weights.resize(survivors.ids.size());
    const Softmax scaled = {1, softmax.most, softmax.least};
    kernels().sampling.weigh(survivors.scaled.data(), survivors.count(), scaled, survivors.weights.data());
}

void keep_nucleus(double top_p, double total, SamplingMemory& memory) {
    Survivors& survivors = memory.survivors;
    keep(cut_of(survivors.scaled, survivors.weights.data(), top_p * total, memory), survivors);
}

}  // namespace tandem
