#include "weight.h"

#include <stdexcept>

#include "dense.h"

namespace tandem {

int64_t PackedWeight::row_of(int64_t panel, int64_t column) const {
    if (!gated_) {
        const int64_t row = panel * panel_columns + column;
        return row < rows_ ? row : -1;
    }
    constexpr int64_t half = panel_columns / 2;
    const int64_t row = panel * half + column % half;
    if (row >= rows_ / 2) return -1;
    return column < half ? row : rows_ / 2 + row;
}

std::unique_ptr<PackedWeight> pack(const Matrix& matrix, bool gated) {
    if (gated && matrix.rows % 2 != 0) throw std::invalid_argument("gated weights have as many gates as values");
    if (matrix.kind == Kind::bfloat16) return std::make_unique<DenseBFloat16>(matrix, gated);
    if (matrix.kind == Kind::float16) return std::make_unique<DenseFloat16>(matrix, gated);
    return std::make_unique<DenseFloat32>(matrix, gated);
}

}  // namespace tandem
