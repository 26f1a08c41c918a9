#include "dense.h"

#include <type_traits>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace tandem {

DenseBFloat16::DenseBFloat16(const Matrix& matrix, bool gated)
    : PackedWeight(matrix.rows, matrix.columns, gated),
      steps_(rounded_up(matrix.columns, input_step) / input_step),
      memory_(Memory::beside_others(num_panels() * steps_ * input_step * panel_columns * sizeof(BFloat16))) {
    const BFloat16* const items = static_cast<const BFloat16*>(matrix.items);
    on_all_threads(num_panels(), [&](int64_t index) {
        BFloat16* const to = panel(index);
        for (int64_t column = 0; column < panel_columns; column++) {
            const int64_t row = row_of(index, column);
            if (row < 0) continue;
            const BFloat16* const from = items + row * columns();
            for (int64_t k = 0; k < columns(); k++) to[place_in_panel(k, column)] = from[k];
        }
    });
}

BFloat16* DenseBFloat16::panel(int64_t index) const {
    return reinterpret_cast<BFloat16*>(memory_.data()) + index * steps_ * input_step * panel_columns;
}

void DenseBFloat16::multiply(const Input& input, int64_t first_row, int64_t num_rows, int64_t index,
                             const Output& output) const {
    kernels().multiply_bfloat16(panel(index), steps_, input, first_row, num_rows, index, output);
}

void DenseBFloat16::row(int64_t index, float* items) const {
    const BFloat16* const from = panel(index / panel_columns);
    for (int64_t k = 0; k < columns(); k++) {
        items[k] = widened(from[place_in_panel(k, index % panel_columns)]);
    }
}

template <class Item>
DenseWide<Item>::DenseWide(const Matrix& matrix, bool gated)
    : PackedWeight(matrix.rows, matrix.columns, gated),
      memory_(Memory::beside_others(num_panels() * matrix.columns * panel_columns * sizeof(Item))) {
    const Item* const items = static_cast<const Item*>(matrix.items);
    on_all_threads(num_panels(), [&](int64_t index) {
        Item* const to = panel(index);
        for (int64_t column = 0; column < panel_columns; column++) {
            const int64_t row = row_of(index, column);
            if (row < 0) continue;
            const Item* const from = items + row * columns();
            for (int64_t k = 0; k < columns(); k++) to[k * panel_columns + column] = from[k];
        }
    });
}

template <class Item>
Item* DenseWide<Item>::panel(int64_t index) const {
    return reinterpret_cast<Item*>(memory_.data()) + index * columns() * panel_columns;
}

template <>
void DenseFloat32::multiply(const Input& input, int64_t first_row, int64_t num_rows, int64_t index,
                            const Output& output) const {
    kernels().multiply_float32(panel(index), columns(), input, first_row, num_rows, index, output);
}

template <>
void DenseFloat16::multiply(const Input& input, int64_t first_row, int64_t num_rows, int64_t index,
                            const Output& output) const {
    kernels().multiply_float16(panel(index), columns(), input, first_row, num_rows, index, output);
}

template <class Item>
void DenseWide<Item>::row(int64_t index, float* items) const {
    const Item* const from = panel(index / panel_columns) + index % panel_columns;
    std::vector<Item> found(columns());
    for (int64_t k = 0; k < columns(); k++) found[k] = from[k * panel_columns];
    kernels().widen(found.data(), std::is_same<Item, float>::value ? Kind::float32 : Kind::float16, columns(), items);
}

template class DenseWide<float>;
template class DenseWide<Float16>;

}  // namespace tandem
