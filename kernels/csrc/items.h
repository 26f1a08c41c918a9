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

constexpr int64_t rounded_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

}  // namespace tandem
