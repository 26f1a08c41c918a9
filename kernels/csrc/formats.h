// How weights lie in files: dense kinds, and GGUF's blocks of quantized ones.
//
//     q8_0          q scale, which here is (q + 128 - centre) scale: codes are never negative
//     q4_0, q5_0    (q - centre) scale
//     q4_1, q5_1    q scale + least
//     q4_k, q5_k    q (scale factor) - (least factor)    factors of 6 bits for each 32, scale and least for 256
//     q6_k          (q - 32) (scale factor)              factors of 8 bits for each 16, scale for 256
//
// Scales and leasts are float16. Every product of these is exact in float32, so that a weight is rounded at most once,
// by the last addition, in whatever order it is made.
#pragma once

#include <cstdint>
#include <string>

#include "items.h"

namespace tandem {

enum class Format { float32, bfloat16, float16, q8_0, q4_0, q4_1, q5_0, q5_1, q4_k, q5_k, q6_k };

// What the files of one instruction set use of this is static: the linker must not take one's copy for another's. And it
// is always put in its callers, which know the format, so that nothing of it is left to compute.
#define TANDEM_FOLDED [[gnu::always_inline]] static inline

constexpr int64_t step_weights = 32;  // of one row, read at once
constexpr int64_t most_group_steps = 8;

// How codes are made into weights.
struct Coding {
    int bits;             // of a code; 0 where weights are not quantized
    int centre;           // taken from a code
    bool has_least;       // beside the scale
    int64_t num_factors;  // bytes, for each step, that multiply scale and least
    int64_t group_steps;  // that share a scale
    int64_t file_bytes;   // of a group in a file
};

TANDEM_FOLDED constexpr Coding coding_of(Format format) {
    switch (format) {
        case Format::q8_0: return {8, 128, false, 0, 1, 34};
        case Format::q4_0: return {4, 8, false, 0, 1, 18};
        case Format::q4_1: return {4, 0, true, 0, 1, 20};
        case Format::q5_0: return {5, 16, false, 0, 1, 22};
        case Format::q5_1: return {5, 0, true, 0, 1, 24};
        case Format::q4_k: return {4, 0, true, 2, most_group_steps, 144};
        case Format::q5_k: return {5, 0, true, 2, most_group_steps, 176};
        case Format::q6_k: return {6, 32, false, 2, most_group_steps, 210};
        case Format::float32: return {0, 0, false, 0, 1, 128};
        default: return {0, 0, false, 0, 1, 64};
    }
}

TANDEM_FOLDED constexpr bool is_quantized(Format format) { return coding_of(format).bits > 0; }
TANDEM_FOLDED constexpr Format format_of(Kind kind) {
    return kind == Kind::float32 ? Format::float32 : kind == Kind::bfloat16 ? Format::bfloat16 : Format::float16;
}
TANDEM_FOLDED constexpr Kind kind_of(Format dense) {
    return dense == Format::float32 ? Kind::float32 : dense == Format::bfloat16 ? Kind::bfloat16 : Kind::float16;
}

// Throws std::invalid_argument for an unknown name.
Format format_named(const std::string& name);

// Of a row in a file. Throws std::invalid_argument when the format's blocks do not fill it.
int64_t row_bytes(Format format, int64_t columns);

// 32 weights of one row, taken out of their block.
struct Codes {
    uint8_t codes[step_weights];
    uint16_t scale, least;  // bits of float16
    uint8_t factors[2];     // of scale and least; q6_k: of the scale, for the first 16 weights and the others
};

Codes read_codes(Format quantized, const char* row, int64_t step);

// A row of any format as float32.
void widen_row(Format format, const char* row, int64_t columns, float* items);

// Rows of any format, one behind the other, as items of `kind`.
void expand_rows(Format format, const char* rows, int64_t num_rows, int64_t columns, Kind kind, char* items);

}  // namespace tandem
