#include "formats.h"

#include <stdexcept>
#include <vector>

#include "kernels.h"

namespace tandem {
namespace {

// GGUF's formats, by the byte each piece starts at in its block.

uint16_t half_at(const uint8_t* bytes) { return static_cast<uint16_t>(bytes[0] | bytes[1] << 8); }

// The first 16 weights lie in the lower halves of 16 bytes, the others in the upper.
void read_nibbles(const uint8_t* bytes, Codes& to) {
    for (int i = 0; i < 16; i++) {
        to.codes[i] = bytes[i] & 15;
        to.codes[16 + i] = bytes[i] >> 4;
    }
}

void add_fifth_bits(const uint8_t* bytes, Codes& to) {
    for (int i = 0; i < step_weights; i++) to.codes[i] |= (bytes[i / 8] >> i % 8 & 1) << 4;
}

Codes read_q8_0(const uint8_t* block) {
    Codes found = {};
    found.scale = half_at(block);
    for (int i = 0; i < step_weights; i++) found.codes[i] = block[2 + i] ^ 0x80;
    return found;
}

// [scale] [least] [fifth bits] [nibbles]
Codes read_small(const Coding& coding, const uint8_t* block) {
    Codes found = {};
    found.scale = half_at(block);
    block += 2;
    if (coding.has_least) found.least = half_at(block), block += 2;
    const uint8_t* const fifths = block;
    read_nibbles(coding.bits == 5 ? block + 4 : block, found);
    if (coding.bits == 5) add_fifth_bits(fifths, found);
    return found;
}

// Eight factors of scales and eight of leasts in 12 bytes: the first four of each in six bits of a byte, the others in
// four bits of a byte, their upper two above the first four.
void read_factors(const uint8_t* bytes, int64_t step, Codes& to) {
    if (step < 4) {
        to.factors[0] = bytes[step] & 63;
        to.factors[1] = bytes[4 + step] & 63;
        return;
    }
    to.factors[0] = (bytes[4 + step] & 15) | (bytes[step - 4] >> 6) << 4;
    to.factors[1] = bytes[4 + step] >> 4 | (bytes[step] >> 6) << 4;
}

// [scale] [least] [12 bytes of factors] [32 bytes of fifth bits] [nibbles: 64 weights in 32 bytes]
Codes read_large(const Coding& coding, const uint8_t* block, int64_t step) {
    Codes found = {};
    found.scale = half_at(block);
    found.least = half_at(block + 2);
    read_factors(block + 4, step, found);
    const uint8_t* const fifths = block + 16;
    const uint8_t* const nibbles = (coding.bits == 5 ? block + 48 : block + 16) + step / 2 * 32;
    for (int i = 0; i < step_weights; i++) {
        found.codes[i] = step % 2 == 0 ? nibbles[i] & 15 : nibbles[i] >> 4;
        if (coding.bits == 5) found.codes[i] |= (fifths[i] >> step & 1) << 4;
    }
    return found;
}

// [nibbles: 128 weights in 64 bytes] [upper two bits: 128 weights in 32 bytes] [16 factors] [scale]
Codes read_q6_k(const uint8_t* block, int64_t step) {
    Codes found = {};
    const int64_t half = step / 4, quarter = step % 4;
    const uint8_t* const nibbles = block + half * 64 + quarter % 2 * 32;
    const uint8_t* const uppers = block + 128 + half * 32;
    for (int i = 0; i < step_weights; i++) {
        found.codes[i] = (quarter < 2 ? nibbles[i] & 15 : nibbles[i] >> 4) | (uppers[i] >> 2 * quarter & 3) << 4;
    }
    memcpy(found.factors, block + 192 + step * 2, 2);
    found.scale = half_at(block + 208);
    return found;
}

float float_of_half(uint16_t bits) {
    float value;
    kernels().widen(&bits, Kind::float16, 1, &value);
    return value;
}

struct Scale {
    float scale, least;
};

Scale scale_of(Format format, const Codes& codes, int64_t half_step) {
    const Scale shared = {float_of_half(codes.scale), float_of_half(codes.least)};
    const Coding coding = coding_of(format);
    if (coding.num_factors == 0) return shared;
    if (!coding.has_least) return {shared.scale * static_cast<int8_t>(codes.factors[half_step]), 0};
    return {shared.scale * codes.factors[0], -(shared.least * codes.factors[1])};
}

void widen_step(Format format, const Codes& codes, float* items) {
    const Coding coding = coding_of(format);
    for (int64_t half = 0; half < 2; half++) {
        const Scale scale = scale_of(format, codes, half);
        for (int64_t i = half * 16; i < half * 16 + 16; i++) {
            items[i] = scale.scale * static_cast<float>(codes.codes[i] - coding.centre);
            if (coding.has_least) items[i] += scale.least;
        }
    }
}

}  // namespace

Format format_named(const std::string& name) {
    static const char* const names[] = {"float32", "bfloat16", "float16", "q8_0", "q4_0", "q4_1",
                                        "q5_0",    "q5_1",     "q4_k",    "q5_k", "q6_k"};
    for (int i = 0; i < static_cast<int>(sizeof(names) / sizeof(names[0])); i++) {
        if (name == names[i]) return static_cast<Format>(i);
    }
    throw std::invalid_argument("unknown format " + name);
}

int64_t row_bytes(Format format, int64_t columns) {
    if (!is_quantized(format)) return columns * static_cast<int64_t>(item_bytes(kind_of(format)));
    const int64_t length = coding_of(format).group_steps * step_weights;
    if (columns % length == 0) return columns / length * coding_of(format).file_bytes;
    throw std::invalid_argument("blocks of " + std::to_string(length) + " weights do not fill " +
                                std::to_string(columns) + " columns");
}

Codes read_codes(Format format, const char* row, int64_t step) {
    const Coding coding = coding_of(format);
    const char* const group = row + step / coding.group_steps * coding.file_bytes;
    const uint8_t* const block = reinterpret_cast<const uint8_t*>(group);
    step %= coding.group_steps;
    if (coding.bits == 8) return read_q8_0(block);
    if (coding.num_factors == 0) return read_small(coding, block);
    return coding.bits == 6 ? read_q6_k(block, step) : read_large(coding, block, step);
}

void widen_row(Format format, const char* row, int64_t columns, float* items) {
    if (!is_quantized(format)) return kernels().widen(row, kind_of(format), columns, items);
    for (int64_t step = 0; step < columns / step_weights; step++) {
        widen_step(format, read_codes(format, row, step), items + step * step_weights);
    }
}

void expand_rows(Format format, const char* rows, int64_t num_rows, int64_t columns, Kind kind, char* items) {
    std::vector<float> wide(columns);
    const int64_t stored_bytes = row_bytes(format, columns);
    const int64_t expanded_bytes = columns * static_cast<int64_t>(item_bytes(kind));
    for (int64_t row = 0; row < num_rows; row++) {
        widen_row(format, rows + row * stored_bytes, columns, wide.data());
        kernels().narrow(wide.data(), columns, kind, items + row * expanded_bytes);
    }
}

}  // namespace tandem
