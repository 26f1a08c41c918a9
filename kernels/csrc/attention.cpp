#include "attention.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels.h"

namespace tandem {

// The most that any instruction set's attention asks for; each lays its own out.
int64_t attention_scratch_bytes(const AttentionShape& shape) {
    const int64_t rows = rounded_up(std::max(most_piece_rows, shape.share), 16);
    const int64_t dims = rounded_up(shape.head_dim, 32);
    const int64_t floats = rows * (2 * dims + key_step + 2) + key_step * (2 * dims + 64);
    return rounded_up(floats * static_cast<int64_t>(sizeof(float)) + 4096, 4096);
}

void merge_parts(const AttentionShape& shape, const float* parts, int64_t num_parts, void* output) {
    const int64_t row_floats = 2 + shape.head_dim, part_floats = shape.share * row_floats;
    std::vector<float> merged(shape.head_dim);
    for (int64_t head = 0; head < shape.share; head++) {
        const float* const rows = parts + head * row_floats;
        float most = rows[0], weights = 0;
        for (int64_t i = 1; i < num_parts; i++) most = std::max(most, rows[i * part_floats]);
        std::fill(merged.begin(), merged.end(), 0.0f);
        for (int64_t i = 0; i < num_parts; i++) {
            const float* const row = rows + i * part_floats;
            const float factor = std::exp(row[0] - most);
            weights += factor * row[1];
            for (int64_t d = 0; d < shape.head_dim; d++) merged[d] += factor * row[2 + d];
        }
        for (float& item : merged) item /= weights;
        char* const to = static_cast<char*>(output) + head * shape.head_dim * item_bytes(shape.output_kind);
        kernels().narrow(merged.data(), shape.head_dim, shape.output_kind, to);
    }
}

}  // namespace tandem
