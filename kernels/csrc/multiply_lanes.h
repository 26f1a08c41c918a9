// Products with lanes: each weight is read once for several rows, and each sum runs over k in order, so that a result
// does not depend on how many rows were multiplied together.
#pragma once

#include <type_traits>

#include "finish_lanes.h"

namespace tandem::TANDEM_ISA_NAMESPACE {

#if defined(__AVX512F__)
constexpr int rows_at_once = 8;  // twice as many sums, of 32 registers
#elif defined(__AVX2__)
constexpr int rows_at_once = 2;
#else
constexpr int rows_at_once = 1;
#endif

constexpr int64_t prefetch_bytes = 4096;  // ahead: some 200 ns of one core's share of the memory

inline void prefetch(const void* items) { __builtin_prefetch(static_cast<const char*>(items) + prefetch_bytes); }

// One of `rows` inputs: its row of float32, or of bfloat16.
template <class Item>
inline const Item* input_row(const Input& input, int64_t row) {
    return reinterpret_cast<const Item*>(static_cast<const char*>(input.items) + row * input.row_bytes);
}

// Whether weights come from memory, or were made just now.
enum class From { memory, cache };

template <From from>
inline void prefetch_from(const void* weights) {
    if constexpr (from == From::memory) prefetch(weights);
}

// Weights of float32, or what widens to it, times float32.
template <class Wide>
struct Float32Step {
    using Weight = Wide;
    using Item = float;
    static constexpr int64_t length = 1;  // k

    template <From from, int rows>
    static void accumulate(const Wide* weights, const float* const* inputs, int64_t k, PanelRow* sums) {
        const Lanes first = load(weights), second = load(weights + num_lanes);
        prefetch_from<from>(weights);
        prefetch_from<from>(weights + num_lanes);
        for (int i = 0; i < rows; i++) {
            const Lanes item = all(inputs[i][k]);
            sums[i] = {fma(first, item, sums[i].first), fma(second, item, sums[i].second)};
        }
    }
};

#if defined(__AVX512BF16__)
inline Lanes add_products_of_pairs(Lanes sum, const BFloat16* weights, const BFloat16* pair) {
    int bits;
    memcpy(&bits, pair, sizeof(bits));
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(_mm512_loadu_si512(weights)),
                             reinterpret_cast<__m512bh>(_mm512_set1_epi32(bits)))};
}
#else
inline Lanes add_products_of_pairs(Lanes sum, const BFloat16* weights, const BFloat16* pair) {
    const Lanes once = fma(load_first_of_pairs(weights), all(widened(pair[0])), sum);
    return fma(load_second_of_pairs(weights), all(widened(pair[1])), once);
}
#endif

struct BFloat16Step {
    using Weight = BFloat16;
    using Item = BFloat16;
    static constexpr int64_t length = input_step;

    template <From from, int rows>
    static void accumulate(const BFloat16* weights, const BFloat16* const* inputs, int64_t k, PanelRow* sums) {
        constexpr int64_t line = 2 * num_lanes, tile = input_step * num_lanes;
        for (int64_t pair = 0; pair < input_step / 2; pair++, weights += line) {
            prefetch_from<from>(weights);
            prefetch_from<from>(weights + tile);
            for (int i = 0; i < rows; i++) {
                const BFloat16* const items = inputs[i] + k + 2 * pair;
                sums[i] = {add_products_of_pairs(sums[i].first, weights, items),
                           add_products_of_pairs(sums[i].second, weights + tile, items)};
            }
        }
    }
};

// Some rows' products with one panel, as far as its weights were given.
template <class Step, int rows>
class RowSums {
   public:
    RowSums(const Input& input, int64_t first_row) {
        for (int i = 0; i < rows; i++) {
            inputs_[i] = input_row<typename Step::Item>(input, first_row + i);
            sums_[i] = {all(0), all(0)};
        }
    }

    // `weights`: of k in [first, end).
    template <From from>
    void add(const typename Step::Weight* weights, int64_t first, int64_t end) {
        for (int64_t k = first; k < end; k += Step::length, weights += Step::length * panel_columns) {
            Step::template accumulate<from, rows>(weights, inputs_, k, sums_);
        }
    }

    void finish_all(const Output& output, int64_t first_row, int64_t panel_index) const {
        for (int i = 0; i < rows; i++) finish(output, first_row + i, panel_index, sums_[i]);
    }

   private:
    const typename Step::Item* inputs_[rows];
    PanelRow sums_[rows];
};

// Calls multiply(number of rows, known to the compiler) where there are `num_rows`, at most `rows`.
template <int rows, class Multiply>
void with_rows(int64_t num_rows, Multiply multiply) {
    if constexpr (rows > 0) {
        if (num_rows == rows) return multiply(std::integral_constant<int, rows>());
        with_rows<rows - 1>(num_rows, multiply);
    }
}

template <class Step>
void multiply_panel(const typename Step::Weight* panel, int64_t columns, const Input& input, int64_t first_row,
                    int64_t num_rows, int64_t panel_index, const Output& output) {
    const int64_t end = first_row + num_rows;
    for (int64_t row = first_row; row < end; row += rows_at_once) {
        with_rows<rows_at_once>(end - row < rows_at_once ? end - row : rows_at_once, [&](auto rows) {
            RowSums<Step, rows> sums(input, row);
            sums.template add<From::memory>(panel, 0, columns);
            sums.finish_all(output, row, panel_index);
        });
    }
}

inline void multiply_float32(const float* panel, int64_t columns, const Input& input, int64_t first_row,
                             int64_t num_rows, int64_t panel_index, const Output& output) {
    multiply_panel<Float32Step<float>>(panel, columns, input, first_row, num_rows, panel_index, output);
}

inline void multiply_float16(const Float16* panel, int64_t columns, const Input& input, int64_t first_row,
                             int64_t num_rows, int64_t panel_index, const Output& output) {
    multiply_panel<Float32Step<Float16>>(panel, columns, input, first_row, num_rows, panel_index, output);
}

inline void multiply_bfloat16(const BFloat16* panel, int64_t steps, const Input& input, int64_t first_row,
                              int64_t num_rows, int64_t panel_index, const Output& output) {
    multiply_panel<BFloat16Step>(panel, steps * input_step, input, first_row, num_rows, panel_index, output);
}

}  // namespace tandem::TANDEM_ISA_NAMESPACE
