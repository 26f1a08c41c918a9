#include "quantized.h"

#include <algorithm>
#include <stdexcept>

#include "dense.h"
#include "kernels.h"
#include "threads.h"

namespace tandem {
namespace {

struct Row {
    Format format;
    const char* items;
};

Row row_in(const std::vector<Part>& parts, int64_t columns, int64_t index) {
    for (const Part& part : parts) {
        if (index < part.rows) return {part.format, part.items + index * row_bytes(part.format, columns)};
        index -= part.rows;
    }
    return {};
}

int64_t num_rows(const std::vector<Part>& parts) {
    int64_t total = 0;
    for (const Part& part : parts) total += part.rows;
    return total;
}

// Each thread's own, one for each use.
template <class Use>
char* scratch(int64_t bytes) {
    static thread_local Memory memory;
    if (static_cast<size_t>(bytes) > memory.size()) memory = Memory(bytes);
    return memory.data();
}

template <class Item>
Item* panel_scratch(int64_t steps) {
    return reinterpret_cast<Item*>(scratch<struct Panels>(steps * step_weights * panel_columns * sizeof(Item)));
}

void lay_row(const Strip& strip, int64_t column, const Row& row, int64_t columns) {
    if (is_quantized(strip.format)) {
        for (int64_t step = 0; step < columns / step_weights; step++) {
            lay_codes(strip, step, column, read_codes(row.format, row.items, step));
        }
        return;
    }
    std::vector<float> items(columns);
    widen_row(row.format, row.items, columns, items.data());
    for (int64_t step = 0; step < columns / step_weights; step++) {
        lay_items(strip, step, column, items.data() + step * step_weights, step_weights);
    }
}

std::unique_ptr<PackedWeight> pack_dense(const std::vector<Part>& parts, int64_t columns, Kind kind, bool gated) {
    const int64_t rows = num_rows(parts), bytes = columns * static_cast<int64_t>(item_bytes(kind));
    if (parts.size() == 1 && kind_of(parts[0].format) == kind) {
        return pack({parts[0].items, kind, rows, columns}, gated);
    }
    const Memory matrix(rows * bytes);
    on_all_threads(rows, [&](int64_t index) {
        const Row row = row_in(parts, columns, index);
        std::vector<float> items(columns);
        widen_row(row.format, row.items, columns, items.data());
        kernels().narrow(items.data(), columns, kind, matrix.data() + index * bytes);
    });
    return pack({matrix.data(), kind, rows, columns}, gated);
}

}  // namespace

QuantizedWeight::QuantizedWeight(const std::vector<Part>& parts, int64_t columns, Kind input_kind, bool gated)
    : PackedWeight(num_rows(parts), columns, gated), input_kind_(input_kind), panels_(num_panels()) {
    int64_t total = 0;
    for (int64_t index = 0; index < num_panels(); index++) {
        Strip* const strips = panels_[index].strips;
        for (int i = 0; i < 2; i++) strips[i].format = strip_format(index, i * strip_columns, parts);
        total += panel_bytes(panels_[index]);
    }
    memory_ = Memory::beside_others(total);
    char* next = memory_.data();
    for (Panel& panel : panels_) {
        lay_out(panel, next);
        next += panel_bytes(panel);
    }
    on_all_threads(num_panels(), [&](int64_t index) { fill(index, parts); });
    looked_up_ = input_kind_ == Kind::bfloat16 && std::any_of(panels_.begin(), panels_.end(), [](const Panel& panel) {
                     return kernels().looked_up(panel.strips);
                 });
}

// That of all its rows; dense where they differ, and where there are none whatever is small.
Format QuantizedWeight::strip_format(int64_t panel, int64_t first_column, const std::vector<Part>& parts) const {
    const Format dense = format_of(input_kind_);
    bool found = false;
    Format format = Format::q4_0;
    for (int64_t column = first_column; column < first_column + strip_columns; column++) {
        const int64_t row = row_of(panel, column);
        if (row < 0) continue;
        const Format own = row_in(parts, columns(), row).format;
        if (found && own != format) return dense;
        format = own;
        found = true;
    }
    return is_quantized(format) || input_kind_ == Kind::float32 ? format : dense;
}

int64_t QuantizedWeight::turn_steps(const Panel& panel) {
    return std::max(coding_of(panel.strips[0].format).group_steps, coding_of(panel.strips[1].format).group_steps);
}

int64_t QuantizedWeight::turn_bytes(const Panel& panel, int strip) {
    const Format format = panel.strips[strip].format;
    return turn_steps(panel) / coding_of(format).group_steps * group_bytes(format);
}

// A dense strip beside one of long groups may end within a turn.
int64_t QuantizedWeight::panel_bytes(const Panel& panel) const {
    const int64_t num_turns = rounded_up(num_steps(), turn_steps(panel)) / turn_steps(panel);
    return num_turns * (turn_bytes(panel, 0) + turn_bytes(panel, 1));
}

void QuantizedWeight::lay_out(Panel& panel, char* start) const {
    const int64_t both_bytes = turn_bytes(panel, 0) + turn_bytes(panel, 1);
    for (int i = 0; i < 2; i++) {
        panel.strips[i] = {panel.strips[i].format, start + i * turn_bytes(panel, 0), turn_steps(panel), both_bytes};
    }
}

void QuantizedWeight::fill(int64_t index, const std::vector<Part>& parts) {
    for (int64_t column = 0; column < panel_columns; column++) {
        const int64_t row = row_of(index, column);
        if (row < 0) continue;
        const Strip& strip = panels_[index].strips[column / strip_columns];
        lay_row(strip, column % strip_columns, row_in(parts, columns(), row), columns());
    }
}

Input QuantizedWeight::prepared(const Input& input, int64_t num_rows) const {
    if (!looked_up_ || num_rows > block_rows) return input;
    if (num_rows == 1) return {input.items, input.row_bytes, static_cast<const char*>(input.items)};
    char* const pairs = scratch<struct Pairs>(block_rows * columns() * static_cast<int64_t>(sizeof(BFloat16)));
    kernels().pair_up(input, num_rows, num_steps(), pairs);
    return {input.items, input.row_bytes, pairs};
}

void QuantizedWeight::multiply(const Input& input, int64_t first_row, int64_t num_rows, int64_t index,
                               const Output& output) const {
    const Strip* const strips = panels_[index].strips;
    if (input.pairs != nullptr && kernels().looked_up(strips)) {
        return kernels().multiply_few(strips, num_steps(), input, num_rows, index, output);
    }
    if (input_kind_ == Kind::bfloat16) {
        BFloat16* const panel = panel_scratch<BFloat16>(num_steps());
        return kernels().multiply_strips_bfloat16(strips, num_steps(), panel, input, first_row, num_rows, index, output);
    }
    float* const panel = panel_scratch<float>(num_steps());
    kernels().multiply_strips_float32(strips, num_steps(), panel, input, first_row, num_rows, index, output);
}

void QuantizedWeight::row(int64_t index, float* items) const {
    const Strip* const strips = panels_[index / panel_columns].strips;
    const int64_t column = index % panel_columns;
    if (input_kind_ == Kind::float32) {
        float* const panel = panel_scratch<float>(num_steps());
        kernels().expand_float32(strips, num_steps(), panel);
        for (int64_t k = 0; k < columns(); k++) items[k] = panel[k * panel_columns + column];
        return;
    }
    BFloat16* const panel = panel_scratch<BFloat16>(num_steps());
    kernels().expand_bfloat16(strips, num_steps(), panel);
    for (int64_t k = 0; k < columns(); k++) items[k] = widened(panel[place_in_panel(k, column)]);
}

const char* QuantizedWeight::panel_items(int64_t index) const {
    if (index < num_panels()) return panels_[index].strips[0].items;
    return index == 0 ? memory_.data() : panel_items(index - 1) + panel_bytes(panels_[index - 1]);
}

std::unique_ptr<PackedWeight> pack_parts(const std::vector<Part>& parts, int64_t columns, Kind kind, bool gated) {
    if (gated && num_rows(parts) % 2 != 0) throw std::invalid_argument("gated weights have as many gates as values");
    bool dense = true;
    for (const Part& part : parts) {
        row_bytes(part.format, columns);  // throws here what a thread may not
        dense = dense && !is_quantized(part.format);
    }
    if (dense) return pack_dense(parts, columns, kind, gated);
    const Kind input_kind = kind == Kind::bfloat16 ? kind : Kind::float32;
    return std::make_unique<QuantizedWeight>(parts, columns, input_kind, gated);
}

}  // namespace tandem
