// Sixteen floats at once, in the widest registers of the file that includes this.
//
// Everything here and in the *_lanes.h files lives in a namespace named after the instruction set, TANDEM_ISA_NAMESPACE:
// one build holds them all, and no wide code can be linked where a narrow machine would run it. For the same reason
// these files use nothing of the standard library that the linker would merge with others' copies.
#pragma once

#include "items.h"

#if defined(__AVX512F__)
#include "lanes_avx512.h"
#elif defined(__AVX2__)
#include "lanes_avx2.h"
#else
#include "lanes_plain.h"
#endif

namespace tandem::TANDEM_ISA_NAMESPACE {

constexpr int64_t num_lanes = 16;

inline Lanes operator+(Lanes a, Lanes b) { return add(a, b); }
inline Lanes operator-(Lanes a, Lanes b) { return subtract(a, b); }
inline Lanes operator*(Lanes a, Lanes b) { return multiply(a, b); }
inline Lanes operator/(Lanes a, Lanes b) { return divide(a, b); }

// Bytes as floats, more by `byte_excess` than they are where that is cheaper.
#if defined(__AVX512VBMI__)
constexpr float byte_excess = 32768;
inline Lanes load_exceeding(const uint8_t* items) { return bytes_above_32768(items); }
#else
constexpr float byte_excess = 0;
inline Lanes load_exceeding(const uint8_t* items) { return load(items); }
#endif

// The first `count` of 16 items; the others are zero.
template <class Item>
inline Lanes load_some(const Item* items, int64_t count) {
    if (count >= num_lanes) return load(items);
    Item whole[num_lanes] = {};
    memcpy(whole, items, count * sizeof(Item));
    return load(whole);
}

template <class Item>
inline void store_some(Item* items, int64_t count, Lanes lanes) {
    if (count >= num_lanes) return store(items, lanes);
    Item whole[num_lanes];
    store(whole, lanes);
    memcpy(items, whole, count * sizeof(Item));
}

// e to the x, to within 2 units in the last place; 0 below the normal range, as for minus infinity.
inline Lanes exp(Lanes x) {
    const Lanes clamped = max(min(x, all(88.0f)), all(-87.3f));
    const Lanes power = round(clamped * all(1.44269504f));
    // ln 2 in two parts, the first exact in few bits: x - power ln 2 loses nothing.
    const Lanes rest = fma(power, all(2.12194440e-4f), fma(power, all(-0.693359375f), clamped));
    Lanes sum = all(1.9875691500e-4f);
    sum = fma(sum, rest, all(1.3981999507e-3f));
    sum = fma(sum, rest, all(8.3334519073e-3f));
    sum = fma(sum, rest, all(4.1665795894e-2f));
    sum = fma(sum, rest, all(1.6666665459e-1f));
    sum = fma(sum, rest, all(5.0000001201e-1f));
    const Lanes result = scale_by_power_of_two(fma(sum, rest * rest, rest + all(1.0f)), power);
    return zero_where_less(result, x, all(-87.3f));
}

inline Lanes silu(Lanes x) { return x / (all(1.0f) + exp(all(0.0f) - x)); }

inline Lanes tanh(Lanes x) { return all(1.0f) - all(2.0f) / (exp(x + x) + all(1.0f)); }

// Squashes into (-cap, cap), smoothly; a cap of 0 is none.
inline Lanes soft_capped(Lanes x, float cap) { return cap > 0 ? tanh(x / all(cap)) * all(cap) : x; }

}  // namespace tandem::TANDEM_ISA_NAMESPACE
