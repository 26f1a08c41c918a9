#include "sampling_cut.h"

#include <algorithm>
#include <cmath>

#include "kernels.h"

namespace tandem {
namespace {

// Above the least, and at most the most.
float between(const Range& range) {
    const float middle = range.least / 2 + range.most / 2;
    return middle > range.least && middle <= range.most ? middle : range.most;
}

}  // namespace

void Counted::set(const float* numbers, const float* amounts, int64_t count) {
    count_ = count;
    const size_t room = static_cast<size_t>(count + room_beyond);
    if (numbers_.size() < room) numbers_.resize(room), amounts_.resize(room);
    std::copy_n(numbers, count, numbers_.begin());
    if (amounts == nullptr) {
        std::fill_n(amounts_.begin(), count, 1.0f);
    } else {
        std::copy_n(amounts, count, amounts_.begin());
    }
}

double Counted::total() const {
    return kernels().sampling.sum_not_below(numbers_.data(), amounts_.data(), count_, -INFINITY);
}

// All that is left is equal.
Cut Counted::cut_equals(float number, double missing) const {
    const double amount = amounts_[0], most = static_cast<double>(count_);
    const double wanted = amount > 0 ? std::ceil(missing / amount) : most;
    const int64_t num_equal = static_cast<int64_t>(std::clamp(wanted, 1.0, most));
    return {number, num_equal, count_ - num_equal};
}

// Halves the range of what the cut may go through until all in it are equal.
Cut Counted::cut_at(double target) {
    const SamplingKernels& lanes = kernels().sampling;
    double before = 0;
    for (;;) {
        const Range range = lanes.range(numbers_.data(), count_);
        if (range.least == range.most) return cut_equals(range.most, target - before);
        const float middle = between(range);
        const double upper = lanes.sum_not_below(numbers_.data(), amounts_.data(), count_, middle);
        const bool reached = before + upper >= target;
        const float low = reached ? middle : -INFINITY, high = reached ? INFINITY : middle;
        count_ = lanes.keep_between(numbers_.data(), amounts_.data(), count_, low, high);
        if (!reached) before += upper;
    }
}

}  // namespace tandem
