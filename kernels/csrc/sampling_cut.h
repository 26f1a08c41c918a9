// Where the likeliest of a row end: found without sorting.
#pragma once

#include <cstdint>
#include <vector>

namespace tandem {

// Everything above `least` is kept, and of what equals it the first `num_equal`, but not the last `num_surplus`.
struct Cut {
    float least;
    int64_t num_equal, num_surplus;
};

// Numbers, and what each counts for.
class Counted {
   public:
    // Copies at least one finite number, and its amount, which is not negative; equal numbers have equal amounts.
    // Without amounts each counts for 1.
    void set(const float* numbers, const float* amounts, int64_t count);

    double total() const;

    // In falling order those are kept whose predecessors do not amount to the target together: at least one, and all
    // where everything does not amount to it. Uses the numbers up.
    Cut cut_at(double target);

   private:
    Cut cut_equals(float number, double missing) const;

    std::vector<float> numbers_, amounts_;
    int64_t count_ = 0;
};

}  // namespace tandem
