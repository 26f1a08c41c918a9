// The numbers that weights, activations and caches are made of.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace tandem {

enum class Kind { float32, bfloat16, float16 };

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

constexpr size_t item_bytes(Kind kind) { return kind == Kind::float32 ? sizeof(float) : sizeof(uint16_t); }

static inline float widened(BFloat16 item) {
    const uint32_t bits = static_cast<uint32_t>(item.bits) << 16;
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

constexpr int64_t rounded_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

}  // namespace tandem
