// Strips of any format made into weights as the dense products take them: bfloat16, rounded to nearest, ties to even, or
// float32.
#pragma once

#include "lanes.h"
#include "multiply_lanes.h"
#include "strip.h"

namespace tandem::TANDEM_ISA_NAMESPACE {

constexpr int64_t packed_bytes_ahead = 4096;

// Both groups of 8 columns at once.
struct Groups {
    Lanes first, second;
};

// What 16 k of a strip are multiplied by, and what is added then: for each column, and for each lane.
struct ColumnScales {
    Lanes scale, least;
};
struct Scales {
    Groups scale, least;
};

inline Groups twice(Lanes columns) { return {first_half_twice(columns), last_half_twice(columns)}; }
inline Scales twice(const ColumnScales& columns) { return {twice(columns.scale), twice(columns.least)}; }

inline Lanes load_halves(const char* items) { return load(reinterpret_cast<const Float16*>(items)); }

template <class Byte>
inline Lanes load_factors(const char* items) {
    return load(reinterpret_cast<const Byte*>(items));
}

// A code's centre is taken away with the product where no table of numbers does it at no cost. That rounds nothing: what
// is left has 23 bits at most, and so have the products, but for a byte's excess, which fused instructions alone know.
template <Format format>
constexpr bool centre_added = coding_of(format).bits == 6 || coding_of(format).bits == 8;
template <Format format>
constexpr float added_centre = coding_of(format).centre + (coding_of(format).bits == 8 ? byte_excess : 0);

// `header`: of the group; `factors`: of the step; `half`: of its k.
template <Format format>
ColumnScales load_scales(const char* header, const char* factors, int64_t half) {
    constexpr Coding coding = coding_of(format);
    Lanes scale = load_halves(header), least = all(0);
    if constexpr (coding.has_least) least = load_halves(header + strip_columns * sizeof(Float16));
    if constexpr (coding.num_factors > 0 && coding.has_least) {
        scale = scale * load_factors<uint8_t>(factors);
        least = all(0) - least * load_factors<uint8_t>(factors + strip_columns);
    } else if constexpr (coding.num_factors > 0) {
        scale = scale * load_factors<int8_t>(factors + half * strip_columns);
    }
    if constexpr (centre_added<format>) least = scale * all(-added_centre<format>);
    return {scale, least};
}

// The codes of 8 pairs of k, one pair after the other.
template <Format format>
class CodedPairs {
   public:
    CodedPairs(const char* codes, int64_t half) {
        if constexpr (bits == 8) {
            next_ = codes + half * 16 * num_lanes;
            return;
        }
        next_ = codes + half * word_line_bytes / 2;
        if constexpr (bits == 5) {
            high_[0] = load_words(codes + 4 * word_line_bytes);
            high_[1] = turned_by_16(high_[0]);
            if (half == 1) high_[0] = shifted_right(high_[0], 8), high_[1] = shifted_right(high_[1], 8);
        }
        if constexpr (bits == 6) {
            high_[0] = load_words(codes + 4 * word_line_bytes);
            high_[1] = load_words(codes + 5 * word_line_bytes);
            if (half == 1) high_[0] = turned_by_16(high_[0]), high_[1] = turned_by_16(high_[1]);
        }
    }

    Groups next() {
        if constexpr (bits == 8) {
            const uint8_t* const items = reinterpret_cast<const uint8_t*>(next_);
            next_ += 2 * num_lanes;
            return {load_exceeding(items), load_exceeding(items + num_lanes)};
        } else {
            constexpr int centre = centre_added<format> ? 0 : coding_of(format).centre;
            const Words first = spread_nibbles(next_, next_ + word_line_bytes);
            const Words second = spread_nibbles(next_ + 2 * word_line_bytes, next_ + 3 * word_line_bytes);
            next_ += sizeof(uint32_t);
            const Groups found = {numbers_of<bits, centre>(first, high_[0]), numbers_of<bits, centre>(second, high_[1])};
            if constexpr (bits > 4) {
                for (Words& high : high_) high = shifted_right(high, bits - 4);
            }
            return found;
        }
    }

   private:
    static constexpr int bits = coding_of(format).bits;

    const char* next_;
    Words high_[2] = {};
};

template <Format format>
inline Groups weights_of(const Groups& numbers, const Scales& scales) {
    if constexpr (coding_of(format).has_least || centre_added<format>) {
        return {fma(numbers.first, scales.scale.first, scales.least.first),
                fma(numbers.second, scales.scale.second, scales.least.second)};
    } else {
        return {numbers.first * scales.scale.first, numbers.second * scales.scale.second};
    }
}

template <Format format>
inline void prefetch_step(const char* step) {
    for (int64_t line = 0; line < step_bytes(format); line += 64) {
        __builtin_prefetch(step + packed_bytes_ahead + line);
    }
}

template <Format format, class Write>
void expand_codes(const Strip& strip, int64_t step, Write write) {
    constexpr Coding coding = coding_of(format);
    const char* const header = group_at(strip, format, step);
    const char* const factors = step_at(strip, format, step);
    prefetch_step<format>(factors);
    for (int64_t half = 0; half < 2; half++) {
        const Scales scales = twice(load_scales<format>(header, factors, half));
        CodedPairs<format> pairs(factors + coding.num_factors * strip_columns, half);
#pragma GCC unroll 8
        for (int64_t pair = 0; pair < step_pairs / 2; pair++) {
            write(half * step_pairs / 2 + pair, weights_of<format>(pairs.next(), scales));
        }
    }
}

template <Format format, class Item, class Write>
void expand_items(const Strip& strip, int64_t step, Write write) {
    const Item* items = reinterpret_cast<const Item*>(step_at(strip, format, step));
    for (int64_t pair = 0; pair < step_pairs; pair++, items += 2 * num_lanes) {
        __builtin_prefetch(reinterpret_cast<const char*>(items) + packed_bytes_ahead);
        write(pair, Groups{load(items), load(items + num_lanes)});
    }
}

// Calls write(pair, groups) for each of the 16 pairs of k of a step.
template <class Write>
void expand_step(const Strip& strip, int64_t step, Write write) {
    switch (strip.format) {
        case Format::float32: return expand_items<Format::float32, float>(strip, step, write);
        case Format::bfloat16: return expand_items<Format::bfloat16, BFloat16>(strip, step, write);
        case Format::float16: return expand_items<Format::float16, Float16>(strip, step, write);
        case Format::q8_0: return expand_codes<Format::q8_0>(strip, step, write);
        case Format::q4_0: return expand_codes<Format::q4_0>(strip, step, write);
        case Format::q4_1: return expand_codes<Format::q4_1>(strip, step, write);
        case Format::q5_0: return expand_codes<Format::q5_0>(strip, step, write);
        case Format::q5_1: return expand_codes<Format::q5_1>(strip, step, write);
        case Format::q4_k: return expand_codes<Format::q4_k>(strip, step, write);
        case Format::q5_k: return expand_codes<Format::q5_k>(strip, step, write);
        case Format::q6_k: return expand_codes<Format::q6_k>(strip, step, write);
    }
}

// Of a panel of bfloat16 one tile; of one of float32 half of 32 rows.
inline void expand_tile(const Strip& strip, int64_t step, BFloat16* tile) {
    if (strip.format == Format::bfloat16) {
        memcpy(tile, step_at(strip, Format::bfloat16, step), step_bytes(Format::bfloat16));
        return;
    }
    expand_step(strip, step, [=](int64_t pair, const Groups& weights) {
        store(tile + pair * 2 * num_lanes, weights.first, weights.second);
    });
}
inline void expand_tile(const Strip& strip, int64_t step, float* half_rows) {
    expand_step(strip, step, [=](int64_t pair, const Groups& weights) {
        float* const row = half_rows + pair * 2 * panel_columns;
        store(row, firsts(weights.first, weights.second));
        store(row + panel_columns, seconds(weights.first, weights.second));
    });
}

inline void expand_tiles(const Strip* strips, int64_t step, BFloat16* tiles) {
    expand_tile(strips[0], step, tiles);
    expand_tile(strips[1], step, tiles + strip_columns * step_weights);
}
inline void expand_tiles(const Strip* strips, int64_t step, float* rows) {
    expand_tile(strips[0], step, rows);
    expand_tile(strips[1], step, rows + strip_columns);
}

template <class Item>
void expand_panel(const Strip* strips, int64_t steps, Item* panel) {
    for (int64_t step = 0; step < steps; step++) {
        expand_tiles(strips, step, panel + step * step_weights * panel_columns);
    }
}

// Few rows are multiplied with the weights of each step as soon as they are made; for more a panel, `scratch`, is made
// once.
template <class Step>
void multiply_strips(const Strip* strips, int64_t steps, typename Step::Weight* scratch, const Input& input,
                     int64_t first_row, int64_t num_rows, int64_t panel_index, const Output& output) {
    if (num_rows > rows_at_once) {
        expand_panel(strips, steps, scratch);
        return multiply_panel<Step>(scratch, steps * step_weights, input, first_row, num_rows, panel_index, output);
    }
    with_rows<rows_at_once>(num_rows, [&](auto rows) {
        RowSums<Step, rows> sums(input, first_row);
        for (int64_t step = 0; step < steps; step++) {
            expand_tiles(strips, step, scratch);
            sums.template add<From::cache>(scratch, step * step_weights, (step + 1) * step_weights);
        }
        sums.finish_all(output, first_row, panel_index);
    });
}

}  // namespace tandem::TANDEM_ISA_NAMESPACE
