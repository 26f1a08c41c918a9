#include "dense.h"

#include "kernels.h"
#include "threads.h"

namespace tandem {
namespace {

constexpr int64_t tile_columns = 16;

template <class Function>
void on_all_threads(int64_t num_pieces, Function function) {
    Threads::shared().run([&](Team& team, int member) {
        team.meet(num_pieces);
        for (int64_t piece; (piece = team.take(member)) >= 0;) function(piece);
    });
}

// Where weight (k, column) of a panel lies.
int64_t offset_bfloat16(int64_t k, int64_t column) {
    const int64_t tile = k / input_step * 2 + column / tile_columns;
    return ((tile * 16 + k % input_step / 2) * tile_columns + column % tile_columns) * 2 + k % 2;
}

}  // namespace

DenseBFloat16::DenseBFloat16(const Matrix& matrix, bool gated)
    : PackedWeight(matrix.rows, matrix.columns, gated),
      steps_(rounded_up(matrix.columns, input_step) / input_step),
      memory_(num_panels() * steps_ * input_step * panel_columns * sizeof(BFloat16)) {
    const BFloat16* const items = static_cast<const BFloat16*>(matrix.items);
    on_all_threads(num_panels(), [&](int64_t index) {
        BFloat16* const to = panel(index);
        for (int64_t column = 0; column < panel_columns; column++) {
            const int64_t row = row_of(index, column);
            if (row < 0) continue;
            const BFloat16* const from = items + row * columns();
            for (int64_t k = 0; k < columns(); k++) to[offset_bfloat16(k, column)] = from[k];
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
        const uint32_t bits = static_cast<uint32_t>(from[offset_bfloat16(k, index % panel_columns)].bits) << 16;
        memcpy(items + k, &bits, sizeof(bits));
    }
}

DenseFloat32::DenseFloat32(const Matrix& matrix, bool gated)
    : PackedWeight(matrix.rows, matrix.columns, gated),
      memory_(num_panels() * matrix.columns * panel_columns * sizeof(float)) {
    on_all_threads(num_panels(), [&](int64_t index) {
        float* const to = panel(index);
        Memory whole_row(columns() * sizeof(float));
        float* const items = reinterpret_cast<float*>(whole_row.data());
        for (int64_t column = 0; column < panel_columns; column++) {
            const int64_t row = row_of(index, column);
            if (row < 0) continue;
            const char* const from =
                static_cast<const char*>(matrix.items) + row * columns() * item_bytes(matrix.kind);
            kernels().widen(from, matrix.kind, columns(), items);
            for (int64_t k = 0; k < columns(); k++) to[k * panel_columns + column] = items[k];
        }
    });
}

float* DenseFloat32::panel(int64_t index) const {
    return reinterpret_cast<float*>(memory_.data()) + index * columns() * panel_columns;
}

void DenseFloat32::multiply(const Input& input, int64_t first_row, int64_t num_rows, int64_t index,
                            const Output& output) const {
    kernels().multiply_float32(panel(index), columns(), input, first_row, num_rows, index, output);
}

void DenseFloat32::row(int64_t index, float* items) const {
    const float* const from = panel(index / panel_columns) + index % panel_columns;
    for (int64_t k = 0; k < columns(); k++) items[k] = from[k * panel_columns];
}

}  // namespace tandem
