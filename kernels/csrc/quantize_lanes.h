// Rows of float32 made into GGUF's blocks, block by block: of the scales tried the one that leaves the least squared
// error, fitted to the codes it gave, and the codes of that.
#pragma once

#include "formats.h"
#include "lanes.h"

namespace tandem::TANDEM_ISA_NAMESPACE {

// A block of 32 numbers.
struct Numbers {
    Lanes first, last;
};

inline Numbers load_numbers(const float* items) { return {load(items), load(items + num_lanes)}; }
inline float sum(const Numbers& x) { return sum(x.first + x.last); }
inline float largest(const Numbers& x) { return largest(max(x.first, x.last)); }
inline Numbers product(const Numbers& x, const Numbers& y) { return {x.first * y.first, x.last * y.last}; }
inline Numbers scaled(const Numbers& x, float scale, float offset) {
    return {fma(x.first, all(scale), all(offset)), fma(x.last, all(scale), all(offset))};
}

// To whole numbers in [low, high]; NaN becomes the lowest.
inline Lanes coded(Lanes x, float low, float high) { return round(min(max(x, all(low)), all(high))); }
inline Numbers coded(const Numbers& x, float low, float high) {
    return {coded(x.first, low, high), coded(x.last, low, high)};
}

inline float as_half(float value, char* to) {
    float whole[num_lanes] = {value};
    Float16 halves[num_lanes];
    store(halves, load(whole));
    memcpy(to, halves, sizeof(Float16));
    store(whole, load(halves));
    return whole[0];
}

inline float inverse(float scale) { return scale == 0 ? 0 : 1 / scale; }

// The first 16 in the lower halves of 16 bytes, the others in the upper.
inline void store_nibbles(const Numbers& codes, char* to) {
    float items[2 * num_lanes];
    store(items, codes.first);
    store(items + num_lanes, codes.last);
    for (int i = 0; i < num_lanes; i++) {
        to[i] = static_cast<char>(static_cast<int>(items[i]) | static_cast<int>(items[num_lanes + i]) << 4);
    }
}

inline void quantize_q8_0(const Numbers& x, char* block) {
    const float size = largest(Numbers{max(x.first, all(0) - x.first), max(x.last, all(0) - x.last)});
    const float scale = as_half(size / 127, block);
    const Numbers codes = coded(scaled(x, inverse(scale), 0), -127, 127);
    float items[2 * num_lanes];
    store(items, codes.first);
    store(items + num_lanes, codes.last);
    for (int i = 0; i < 2 * num_lanes; i++) block[2 + i] = static_cast<char>(static_cast<int>(items[i]));
}

// Codes are -8 to 7: the number farthest from zero becomes about one end or about the other.
inline void quantize_q4_0(const Numbers& x, char* block) {
    const float most = largest(x), least = -largest(scaled(x, -1, 0));
    const float far = most > -least ? most : least;
    float best = 0, scale = 0;
    for (int i = 0; i < 32; i++) {
        const float end = i < 20 ? -7.1f - 0.1f * static_cast<float>(i) : 6.3f + 0.1f * static_cast<float>(i - 20);
        const Numbers codes = coded(scaled(x, end * inverse(far), 0), -8, 7);
        // The scale that fits these codes best is their product with x over their square, and takes this much off the
        // error.
        const float along = sum(product(x, codes)), square = sum(product(codes, codes));
        const float gain = along * along * inverse(square);
        if (gain > best) best = gain, scale = along / square;
    }
    store_nibbles(coded(scaled(x, inverse(as_half(scale, block)), 8), 0, 15), block + 2);
}

// A straight line through 32 numbers, from their codes 0 to 15, by least squares.
struct Line {
    float scale, least, error;  // the squared error, less the numbers' own squares
};

inline Line fitted(const Numbers& x, float sum_of_x, const Numbers& codes) {
    constexpr float count = step_weights;
    const float along = sum(product(x, codes)), square = sum(product(codes, codes)), total = sum(codes);
    const float scale = (count * along - total * sum_of_x) * inverse(count * square - total * total);
    const float least = (sum_of_x - scale * total) / count;
    return {scale, least, -(scale * along + least * sum_of_x)};
}

inline void quantize_q4_1(const Numbers& x, char* block) {
    const float most = largest(x), least = -largest(scaled(x, -1, 0)), sum_of_x = sum(x);
    Line best = {0, least, __builtin_inff()};
    for (int i = 0; i < 24; i++) {
        const float steps = 13.6f + 0.1f * static_cast<float>(i), scale = steps * inverse(most - least);
        const Line line = fitted(x, sum_of_x, coded(scaled(x, scale, -least * scale), 0, 15));
        if (line.error < best.error) best = line;
    }
    const float scale = as_half(best.scale, block), start = as_half(best.least, block + 2);
    store_nibbles(coded(scaled(x, inverse(scale), -start * inverse(scale)), 0, 15), block + 4);
}

// Of the formats q8_0, q4_0 and q4_1.
inline void quantize(Format format, const float* items, int64_t columns, char* row) {
    for (int64_t k = 0; k < columns; k += step_weights, row += coding_of(format).file_bytes) {
        const Numbers x = load_numbers(items + k);
        if (format == Format::q8_0) quantize_q8_0(x, row);
        if (format == Format::q4_0) quantize_q4_0(x, row);
        if (format == Format::q4_1) quantize_q4_1(x, row);
    }
}

}  // namespace tandem::TANDEM_ISA_NAMESPACE
