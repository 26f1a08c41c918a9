#include "sampling_cut.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace tandem {
namespace {

constexpr int num_buckets = 256;

// Equal parts of the way from the largest number down to the least. Rounding keeps the order of numbers.
class Buckets {
   public:
    Buckets(const std::vector<Counted>& items) {
        least_ = most_ = items.front().number;
        for (const Counted& item : items) {
            least_ = std::min(least_, static_cast<double>(item.number));
            most_ = std::max(most_, static_cast<double>(item.number));
        }
        scale_ = num_buckets / (most_ - least_);
    }

    bool all_equal() const { return least_ == most_; }

    int of(float number) const { return std::min(num_buckets - 1, static_cast<int>((most_ - number) * scale_)); }

   private:
    double least_, most_, scale_;
};

using Amounts = std::array<double, num_buckets>;

// The bucket in which the target is reached, else the last. `before`: what those before it amount to.
int bucket_reaching(double target, const Amounts& amounts, double& before) {
    for (int bucket = 0; bucket < num_buckets - 1; before += amounts[bucket++]) {
        if (before + amounts[bucket] >= target) return bucket;
    }
    return num_buckets - 1;
}

int64_t num_equal(double missing, double amount, int64_t most) {
    const double wanted = amount > 0 ? std::ceil(missing / amount) : static_cast<double>(most);
    return static_cast<int64_t>(std::clamp(wanted, 1.0, static_cast<double>(most)));
}

}  // namespace

// The bucket that the cut goes through is dealt into buckets again, until all in it are equal.
Cut cut_at(std::vector<Counted>& items, double target) {
    double before = 0;
    for (;;) {
        const Buckets buckets(items);
        const auto [number, amount] = items.front();
        if (buckets.all_equal()) return {number, num_equal(target - before, amount, static_cast<int64_t>(items.size()))};
        Amounts amounts = {};
        for (const Counted& item : items) amounts[buckets.of(item.number)] += item.amount;
        const int chosen = bucket_reaching(target, amounts, before);
        const auto others = [&](const Counted& item) { return buckets.of(item.number) != chosen; };
        items.erase(std::remove_if(items.begin(), items.end(), others), items.end());
    }
}

}  // namespace tandem
