// Weights whose panels are strips: quantized ones of any formats, and dense ones among them.
#pragma once

#include <vector>

#include "strip.h"
#include "weight.h"

namespace tandem {

// Some rows of a matrix, as a file has them.
struct Part {
    const char* items;
    Format format;
    int64_t rows;
};

class QuantizedWeight final : public PackedWeight {
   public:
    QuantizedWeight(const std::vector<Part>& parts, int64_t columns, Kind input_kind, bool gated);
    void multiply(const Input&, int64_t first_row, int64_t num_rows, int64_t panel, const Output&) const override;
    Input prepared(const Input& input, int64_t num_rows) const override;
    void row(int64_t index, float* items) const override;
    const char* panel_items(int64_t index) const override;
    Kind input_kind() const override { return input_kind_; }
    int64_t num_bytes() const override { return static_cast<int64_t>(memory_.size()); }

   private:
    struct Panel {
        Strip strips[2];
    };

    int64_t num_steps() const { return columns() / step_weights; }
    Format strip_format(int64_t panel, int64_t first_column, const std::vector<Part>& parts) const;
    static int64_t turn_steps(const Panel& panel);
    static int64_t turn_bytes(const Panel& panel, int strip);
    int64_t panel_bytes(const Panel& panel) const;
    void lay_out(Panel& panel, char* start) const;
    void fill(int64_t panel, const std::vector<Part>& parts);

    const Kind input_kind_;
    std::vector<Panel> panels_;
    bool looked_up_;  // any of the panels, where inputs are few
    Memory memory_;
};

// The parts' rows one below the other, kept as small as they are where they are quantized. Inputs are bfloat16, and so
// then is every weight as it is multiplied; or else float32. Throws std::invalid_argument for an odd number of gated
// rows, and where blocks do not fill the columns.
std::unique_ptr<PackedWeight> pack_parts(const std::vector<Part>& parts, int64_t columns, Kind kind, bool gated);

}  // namespace tandem
