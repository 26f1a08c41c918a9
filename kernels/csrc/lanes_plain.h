// Sixteen floats in whatever vectors the compiler has: SSE2, NEON, or none.
#pragma once

#include <cmath>

#include "items.h"

namespace tandem::TANDEM_ISA_NAMESPACE {

constexpr int plain_lanes = 16;

struct Lanes {
    float v[plain_lanes];
};

template <class Function>
inline Lanes each(Function function) {
    Lanes result;
    for (int i = 0; i < plain_lanes; i++) result.v[i] = function(i);
    return result;
}

inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}
inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

inline Lanes all(float value) { return each([&](int) { return value; }); }
inline Lanes add(Lanes a, Lanes b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
inline Lanes subtract(Lanes a, Lanes b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
inline Lanes multiply(Lanes a, Lanes b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
inline Lanes divide(Lanes a, Lanes b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
inline Lanes max(Lanes a, Lanes b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline Lanes min(Lanes a, Lanes b) { return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
// Adding and taking away 1.5 × 2^23 leaves no bits for a fraction; right for the small numbers that exp asks about.
inline Lanes round(Lanes a) { return each([&](int i) { return (a.v[i] + 12582912.0f) - 12582912.0f; }); }
inline Lanes scale_by_power_of_two(Lanes a, Lanes power) {
    return each([&](int i) {
        return a.v[i] * float_of(static_cast<uint32_t>(static_cast<int>(power.v[i]) + 127) << 23);
    });
}
inline Lanes zero_where_less(Lanes a, Lanes x, Lanes bound) {
    return each([&](int i) { return x.v[i] < bound.v[i] ? 0.0f : a.v[i]; });
}
inline float sum(Lanes a) {
    float total = 0;
    for (int i = 0; i < plain_lanes; i++) total += a.v[i];
    return total;
}
inline float largest(Lanes a) {
    float found = a.v[0];
    for (int i = 1; i < plain_lanes; i++) found = a.v[i] > found ? a.v[i] : found;
    return found;
}

// Bit i is set where lane i is at least that of the bound; not for a NaN.
inline uint32_t bits_not_below(Lanes a, Lanes bound) {
    uint32_t bits = 0;
    for (int i = 0; i < plain_lanes; i++) bits |= static_cast<uint32_t>(a.v[i] >= bound.v[i]) << i;
    return bits;
}

// Sixteen sums in double precision.
struct Sums {
    double v[plain_lanes] = {};
};
inline Sums operator+(Sums sums, Lanes x) {
    for (int i = 0; i < plain_lanes; i++) sums.v[i] += x.v[i];
    return sums;
}
inline double total(Sums sums) {
    double sum = 0;
    for (int i = 0; i < plain_lanes; i++) sum += sums.v[i];
    return sum;
}

// The exponent is moved to its new bias by a multiplication, which also makes subnormal numbers right.
inline float widened(Float16 item) {
    const uint32_t sign = static_cast<uint32_t>(item.bits & 0x8000) << 16;
    const uint32_t rest = static_cast<uint32_t>(item.bits & 0x7fff) << 13;
    if (rest >= 0x0f800000) return float_of(sign | 0x70000000 | rest);  // infinity, NaN
    return float_of(sign | bits_of(float_of(rest) * 0x1p112f));
}
inline BFloat16 narrowed(float value, BFloat16) {
    const uint32_t bits = bits_of(value);
    if (value != value) return {static_cast<uint16_t>((bits | 0x400000) >> 16)};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline Float16 narrowed(float value, Float16) {
    const uint16_t sign = bits_of(value) >> 16 & 0x8000;
    const float size = fabsf(value);
    if (value != value) return {static_cast<uint16_t>(sign | 0x7e00)};
    if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
    if (size < 0x1p-14f) return {static_cast<uint16_t>(sign | (bits_of(size + 0.5f) - bits_of(0.5f)))};
    const uint32_t bits = bits_of(size);
    return {static_cast<uint16_t>(sign | ((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13))};
}

inline Lanes load(const float* items) { return each([&](int i) { return items[i]; }); }
template <class Item>
inline Lanes load(const Item* items) {
    return each([&](int i) { return widened(items[i]); });
}
inline void store(float* items, Lanes a) { memcpy(items, a.v, sizeof(a.v)); }
template <class Item>
inline void store(Item* items, Lanes a) {
    for (int i = 0; i < plain_lanes; i++) items[i] = narrowed(a.v[i], Item{});
}

// Of 16 pairs of bfloat16 the first, and the second, of each.
inline Lanes load_first_of_pairs(const BFloat16* items) {
    return each([&](int i) { return widened(items[2 * i]); });
}
inline Lanes load_second_of_pairs(const BFloat16* items) {
    return each([&](int i) { return widened(items[2 * i + 1]); });
}

// Sixteen words of 32 bits.
struct Words {
    uint32_t v[plain_lanes];
};

template <class Function>
inline Words each_word(Function function) {
    Words result;
    for (int i = 0; i < plain_lanes; i++) result.v[i] = function(i);
    return result;
}

inline Words load_words(const void* words) {
    Words result;
    memcpy(result.v, words, sizeof(result.v));
    return result;
}
inline Words shifted_right(const Words& a, int count) {
    return each_word([&](int i) { return a.v[i] >> count; });
}
inline Words turned_by_16(const Words& a) {
    return each_word([&](int i) { return a.v[i] >> 16 | a.v[i] << 16; });
}

// Four bits each of two pairs of words of 16 bits, the lowest of the first pair's two words first: a lane has its own in
// bits 0–3, and others above.
inline Words spread_nibbles(const char* first_pair, const char* second_pair) {
    uint32_t pairs[2];
    memcpy(&pairs[0], first_pair, sizeof(uint32_t));
    memcpy(&pairs[1], second_pair, sizeof(uint32_t));
    return each_word([&](int i) { return pairs[i / 8] >> (i % 2 * 16 + i / 2 % 4 * 4); });
}
inline Lanes load(const uint8_t* items) { return each([&](int i) { return static_cast<float>(items[i]); }); }
inline Lanes load(const int8_t* items) { return each([&](int i) { return static_cast<float>(items[i]); }); }

// The numbers of 4, 5 or 6 bits, less the centre: of `low` bits 0–3, of `high` bits 4 and 5.
template <int bits, int centre>
inline Lanes numbers_of(const Words& low, const Words& high) {
    constexpr uint32_t high_mask = (1 << bits) - 16;
    return each([&](int i) {
        return static_cast<float>(static_cast<int>((low.v[i] & 15) | (high.v[i] & high_mask)) - centre);
    });
}

// Of 16 numbers the first 8, and the last, each twice.
inline Lanes first_half_twice(const Lanes& a) {
    return each([&](int i) { return a.v[i / 2]; });
}
inline Lanes last_half_twice(const Lanes& a) {
    return each([&](int i) { return a.v[8 + i / 2]; });
}

// Of 16 pairs in two registers the first, and the second, of each.
inline Lanes firsts(const Lanes& a, const Lanes& b) {
    return each([&](int i) { return i < 8 ? a.v[2 * i] : b.v[2 * i - 16]; });
}
inline Lanes seconds(const Lanes& a, const Lanes& b) {
    return each([&](int i) { return i < 8 ? a.v[2 * i + 1] : b.v[2 * i - 15]; });
}

inline void store(BFloat16* items, const Lanes& a, const Lanes& b) {
    store(items, a);
    store(items + plain_lanes, b);
}

}  // namespace tandem::TANDEM_ISA_NAMESPACE
