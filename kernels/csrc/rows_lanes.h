// What is done to one row at a time: norm, rotation, gate, conversion, the largest item.
#pragma once

#include "kernels.h"
#include "lanes.h"

namespace tandem::TANDEM_ISA_NAMESPACE {

template <class Item>
void normalise_as(const float* items, const float* weight, int64_t count, float epsilon, Item* result) {
    Lanes squares = all(0);
    for (int64_t i = 0; i < count; i += num_lanes) {
        const Lanes some = load_some(items + i, count - i);
        squares = fma(some, some, squares);
    }
    const Lanes scale = all(1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(count) + epsilon));
    for (int64_t i = 0; i < count; i += num_lanes) {
        const Lanes normal = load_some(items + i, count - i) * scale * load_some(weight + i, count - i);
        store_some(result + i, count - i, normal);
    }
}

inline void normalise(const float* items, const float* weight, int64_t count, float epsilon, Kind kind, void* result) {
    if (kind == Kind::bfloat16) return normalise_as(items, weight, count, epsilon, static_cast<BFloat16*>(result));
    normalise_as(items, weight, count, epsilon, static_cast<float*>(result));
}

inline void turn(const Turn& turn, float* head) {
    float* const second_half = head + turn.half;
    for (int64_t i = 0; i < turn.half; i += num_lanes) {
        const int64_t rest = turn.half - i;
        const Lanes cos = load_some(turn.cos + i, rest), sin = load_some(turn.sin + i, rest);
        const Lanes first = load_some(head + i, rest), second = load_some(second_half + i, rest);
        store_some(head + i, rest, first * cos - second * sin);
        store_some(second_half + i, rest, second * cos + first * sin);
    }
}

template <class Item>
void gate_as(const float* gates, const float* ups, int64_t count, Item* result) {
    for (int64_t i = 0; i < count; i += num_lanes) {
        store_some(result + i, count - i, silu(load_some(gates + i, count - i)) * load_some(ups + i, count - i));
    }
}

inline void gate(const float* gates, const float* ups, int64_t count, Kind kind, void* result) {
    if (kind == Kind::bfloat16) return gate_as(gates, ups, count, static_cast<BFloat16*>(result));
    gate_as(gates, ups, count, static_cast<float*>(result));
}

template <class From, class To>
void convert(const From* items, int64_t count, To* result) {
    for (int64_t i = 0; i < count; i += num_lanes) {
        store_some(result + i, count - i, load_some(items + i, count - i));
    }
}

inline void widen(const void* items, Kind kind, int64_t count, float* result) {
    switch (kind) {
        case Kind::float32: return convert(static_cast<const float*>(items), count, result);
        case Kind::bfloat16: return convert(static_cast<const BFloat16*>(items), count, result);
        case Kind::float16: return convert(static_cast<const Float16*>(items), count, result);
    }
}

inline void narrow(const float* items, int64_t count, Kind kind, void* result) {
    switch (kind) {
        case Kind::float32: return convert(items, count, static_cast<float*>(result));
        case Kind::bfloat16: return convert(items, count, static_cast<BFloat16*>(result));
        case Kind::float16: return convert(items, count, static_cast<Float16*>(result));
    }
}

// First the value, a block at a time, then its place in the first block that has it.
inline int64_t largest(const float* items, int64_t count) {
    constexpr int64_t block = 64 * num_lanes;
    int64_t best_block = 0;
    float best = -__builtin_inff();
    for (int64_t start = 0; start < count; start += block) {
        const int64_t end = start + block < count ? start + block : count;
        Lanes most = all(-__builtin_inff());
        int64_t i = start;
        for (; i + num_lanes <= end; i += num_lanes) most = max(most, load(items + i));
        float found = largest(most);
        for (; i < end; i++) found = items[i] > found ? items[i] : found;
        if (found > best) best = found, best_block = start;
    }
    for (int64_t i = best_block; i < count; i++) {
        if (items[i] == best) return i;
    }
    return 0;
}

}  // namespace tandem::TANDEM_ISA_NAMESPACE
