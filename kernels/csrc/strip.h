// Half a panel: 16 columns whose weights are of one format, as small as in a file but in the order of the products.
//
// Step by step of 32 k. The lowest four bits of codes lie so that all k of a column, or a pair of k of many columns, are
// found by moving bits alone. Of all else two groups of 8 columns take turns, whose 16 lanes are (column, k % 2), so that
// lines of weights come out as tiles of bfloat16 are:
//
//     lanes                       c0 k0, c0 k1, c1 k0, c1 k1, …, c7 k1
//     codes of 4 bits             [columns 0–3 | 4–7 | 8–11 | 12–15][32 k] words of 16 bits, column c in bits 4 (c % 4)
//     the fifth bits              [16 lanes] words, pair p of group g in bit (4 + 16 g + p) % 32
//     the fifth and sixth bits    [group][16 lanes] words, pair p in bits (4 + 2 p) % 32
//     codes of 8 bits             [pair][group][16 lanes] bytes, 128 for nought
//     dense                       [pair][group][16 lanes] items
//
// Before the codes of a step, [16 columns] bytes of each factor; before the steps of a group, [16 columns] float16 of
// the scales and of the leasts.
//
#pragma once

#include "formats.h"
#include "weight.h"

namespace tandem {

constexpr int64_t strip_columns = 16;
constexpr int64_t step_pairs = step_weights / 2;
constexpr int64_t word_columns = 4;
constexpr int64_t word_line_bytes = step_weights * sizeof(uint16_t);  // of the lowest four bits of so many columns

TANDEM_FOLDED constexpr int64_t code_bytes(Format format) {
    const int bits = coding_of(format).bits;
    return strip_columns * step_weights / 8 * (bits > 0 ? bits : format == Format::float32 ? 32 : 16);
}
TANDEM_FOLDED constexpr int64_t header_bytes(Format format) {
    if (!is_quantized(format)) return 0;
    return strip_columns * static_cast<int64_t>(sizeof(uint16_t)) * (coding_of(format).has_least ? 2 : 1);
}
TANDEM_FOLDED constexpr int64_t step_bytes(Format format) {
    return coding_of(format).num_factors * strip_columns + code_bytes(format);
}
TANDEM_FOLDED constexpr int64_t group_bytes(Format format) {
    return header_bytes(format) + coding_of(format).group_steps * step_bytes(format);
}

// The two strips of a panel take turns, so that a panel is read from its first byte to its last. A turn is one step, or
// a whole group where one of them has groups.
struct Strip {
    Format format;
    char* items;
    int64_t turn_steps;  // 1 or most_group_steps
    int64_t turn_bytes;  // from turn to turn
};

TANDEM_FOLDED constexpr int64_t turn_of(const Strip& strip, int64_t step) {
    return strip.turn_steps == 1 ? step : step / most_group_steps;
}

// The group of a step, and the step in it. `format` is the strip's, given apart for compilers to know it.
TANDEM_FOLDED char* group_at(const Strip& strip, Format format, int64_t step) {
    const int64_t turn = turn_of(strip, step);
    const int64_t group = coding_of(format).group_steps == 1 ? step - turn * strip.turn_steps : 0;
    return strip.items + turn * strip.turn_bytes + group * group_bytes(format);
}
TANDEM_FOLDED char* step_at(const Strip& strip, Format format, int64_t step) {
    const int64_t place = coding_of(format).group_steps == 1 ? 0 : step % most_group_steps;
    return group_at(strip, format, step) + header_bytes(format) + place * step_bytes(format);
}

// Where weight (k, column) of a step lies among its dense items.
static constexpr int64_t place_in_step(int64_t k, int64_t column) {
    return (k / 2 * 2 + column / 8) * 16 + column % 8 * 2 + k % 2;
}

// Lays one column of a step into zeroed memory.
void lay_codes(const Strip& strip, int64_t step, int64_t column, const Codes& codes);
void lay_items(const Strip& strip, int64_t step, int64_t column, const float* items, int64_t count);

}  // namespace tandem
