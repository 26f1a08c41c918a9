// Where the likeliest of a row end: found without sorting.
#pragma once

#include <cstdint>
#include <vector>

namespace tandem {

// Everything above `least` is kept, and of what equals it the first `num_equal`.
struct Cut {
    float least;
    int64_t num_equal;
};

// A number, and what it counts for. Equal numbers count for the same.
struct Counted {
    float number;
    float amount;
};

// In falling order the numbers are kept whose predecessors do not amount to `target` together: at least one, and all
// where everything does not amount to it. Numbers are finite, amounts not negative, and there is at least one. Changes
// the items.
Cut cut_at(std::vector<Counted>& items, double target);

}  // namespace tandem
