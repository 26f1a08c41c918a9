// Weights that are not quantised.
//
//     bfloat16   panel = [k / 32][2][16 pairs of k][16 columns][2]: a tile of 1 KiB is what one product of AMX takes,
//                one line of it what one product of AVX512-BF16 takes
//     float32    panel = [k][32 columns]; float16 too, widened as it is multiplied
#pragma once

#include "weight.h"

namespace tandem {

// Where weight (k, column) of a panel of bfloat16 lies.
constexpr int64_t place_in_panel(int64_t k, int64_t column) {
    constexpr int64_t tile_columns = 16, tile_pairs = 16;
    const int64_t tile = k / input_step * 2 + column / tile_columns;
    return ((tile * tile_pairs + k % input_step / 2) * tile_columns + column % tile_columns) * 2 + k % 2;
}

class DenseBFloat16 final : public PackedWeight {
   public:
    DenseBFloat16(const Matrix& matrix, bool gated);
    void multiply(const Input&, int64_t first_row, int64_t num_rows, int64_t panel, const Output&) const override;
    void row(int64_t index, float* items) const override;
    const char* panel_items(int64_t index) const override { return reinterpret_cast<const char*>(panel(index)); }
    Kind input_kind() const override { return Kind::bfloat16; }
    int64_t num_bytes() const override { return static_cast<int64_t>(memory_.size()); }

   private:
    BFloat16* panel(int64_t index) const;

    int64_t steps_;  // of 32 k
    Memory memory_;
};

template <class Item>
class DenseWide final : public PackedWeight {
   public:
    DenseWide(const Matrix& matrix, bool gated);
    void multiply(const Input&, int64_t first_row, int64_t num_rows, int64_t panel, const Output&) const override;
    void row(int64_t index, float* items) const override;
    const char* panel_items(int64_t index) const override { return reinterpret_cast<const char*>(panel(index)); }
    Kind input_kind() const override { return Kind::float32; }
    int64_t num_bytes() const override { return static_cast<int64_t>(memory_.size()); }

   private:
    Item* panel(int64_t index) const;

    Memory memory_;
};
using DenseFloat32 = DenseWide<float>;
using DenseFloat16 = DenseWide<Float16>;

}  // namespace tandem
