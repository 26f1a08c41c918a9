// A matrix of weights, packed once for the products of this machine: y = x Wᵀ.
//
// The outputs are cut into panels of 32 columns, and whoever multiplies takes panels one by one. How a panel's weights
// lie in memory is each format's own affair.
#pragma once

#include <cstdint>
#include <memory>

#include "items.h"
#include "memory.h"

namespace tandem {

constexpr int64_t panel_columns = 32;
constexpr int64_t block_rows = 32;  // multiplied at once; inputs are readable up to a multiple of it
constexpr int64_t input_step = 32;  // inputs are zero from their columns up to a multiple of it

// x: rows of float32, or of bfloat16 where the weights are.
struct Input {
    const void* items;
    int64_t row_bytes;
    const char* pairs = nullptr;  // the rows once more, as the weight's prepared() makes them; or null
};

// What becomes of the products of a row. Writable to a whole panel past the last column.
enum class Finish {
    store,  // float32: items = x Wᵀ + bias
    add,    // float32: items += x Wᵀ + bias
    gate,   // of the weights' input kind, half as many columns: items = silu(gate) up
};

struct Output {
    Finish finish;
    Kind kind;  // of the items
    void* items;
    int64_t stride;     // items from row to row
    const float* bias;  // one for each column of every panel; may be null
};

// A dense matrix as its owner has it: [rows, columns], rows apart by `stride` items.
struct Matrix {
    const void* items;
    Kind kind;
    int64_t rows;
    int64_t columns;
};

class PackedWeight {
   public:
    virtual ~PackedWeight() = default;

    // Adds nothing to rows past `first_row + num_rows`, reads inputs up to a multiple of `block_rows`.
    virtual void multiply(const Input& input, int64_t first_row, int64_t num_rows, int64_t panel,
                          const Output& output) const = 0;

    // The input in the order in which so many rows are multiplied fastest: the calling thread's own, until it prepares
    // another. For products of these very rows, from the first.
    virtual Input prepared(const Input& input, int64_t /* num_rows */) const { return input; }

    // One row of W as float32, [columns]. Not for gated weights.
    virtual void row(int64_t index, float* items) const = 0;

    // A panel's weights, one run of memory; panels follow each other.
    virtual const char* panel_items(int64_t panel) const = 0;

    virtual Kind input_kind() const = 0;
    virtual int64_t num_bytes() const = 0;

    int64_t rows() const { return rows_; }        // outputs; of gated weights gate and up together
    int64_t columns() const { return columns_; }  // inputs
    bool gated() const { return gated_; }
    int64_t num_panels() const { return rounded_up(rows_, panel_columns * (gated_ ? 2 : 1)) / panel_columns; }
    int64_t num_outputs() const { return gated_ ? rows_ / 2 : rows_; }

    // The row of W that is a panel's column: with gated weights half a panel is gate, half the same rows of up.
    // -1 past the end.
    int64_t row_of(int64_t panel, int64_t column) const;

   protected:
    PackedWeight(int64_t rows, int64_t columns, bool gated) : rows_(rows), columns_(columns), gated_(gated) {}

   private:
    const int64_t rows_, columns_;
    const bool gated_;
};

// Copies the matrix into the layout of dense weights, on all threads. Gated: the first half of
// the rows are the gate, the second half what it multiplies. Throws std::invalid_argument for an odd number of these.
std::unique_ptr<PackedWeight> pack(const Matrix& matrix, bool gated);

}  // namespace tandem
