// What becomes of a block of products: stored, added, or gated.
#pragma once

#include "lanes.h"
#include "weight.h"

namespace tandem::TANDEM_ISA_NAMESPACE {

// Products of one row with one panel, as two halves of 16 columns.
struct PanelRow {
    Lanes first, second;
};

inline PanelRow biased(PanelRow row, const float* bias) {
    return bias == nullptr ? row : PanelRow{row.first + load(bias), row.second + load(bias + num_lanes)};
}

inline void store_panel(const Output& output, int64_t row, int64_t panel, PanelRow products) {
    float* const to = static_cast<float*>(output.items) + row * output.stride + panel * panel_columns;
    store(to, products.first);
    store(to + num_lanes, products.second);
}

inline void add_panel(const Output& output, int64_t row, int64_t panel, PanelRow products) {
    float* const to = static_cast<float*>(output.items) + row * output.stride + panel * panel_columns;
    store(to, load(to) + products.first);
    store(to + num_lanes, load(to + num_lanes) + products.second);
}

inline void gate_panel(const Output& output, int64_t row, int64_t panel, PanelRow products) {
    const Lanes gated = silu(products.first) * products.second;
    const int64_t place = row * output.stride + panel * num_lanes;
    if (output.kind == Kind::bfloat16) return store(static_cast<BFloat16*>(output.items) + place, gated);
    store(static_cast<float*>(output.items) + place, gated);
}

inline void finish(const Output& output, int64_t row, int64_t panel, PanelRow products) {
    const float* const bias = output.bias == nullptr ? nullptr : output.bias + panel * panel_columns;
    switch (output.finish) {
        case Finish::store: return store_panel(output, row, panel, biased(products, bias));
        case Finish::add: return add_panel(output, row, panel, biased(products, bias));
        case Finish::gate: return gate_panel(output, row, panel, biased(products, bias));
    }
}

}  // namespace tandem::TANDEM_ISA_NAMESPACE
