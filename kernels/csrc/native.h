// Makes the table of one instruction set. Included once by each native_*.cpp, after TANDEM_ISA_NAMESPACE is defined.
#pragma once

#include "attention_lanes.h"
#include "expand_lanes.h"
#include "multiply_lanes.h"
#include "quantize_lanes.h"
#include "rows_lanes.h"
#include "sampling_lanes.h"
#if defined(__AMX_BF16__)
#include "attention_amx.h"
#include "multiply_amx.h"
#include "multiply_few_amx.h"
#include "multiply_strips_amx.h"
#endif

namespace tandem::TANDEM_ISA_NAMESPACE {

constexpr Kernels table() {
    Kernels kernels = {};
    kernels.enter = [] {};
    kernels.leave = [] {};
    kernels.multiply_bfloat16 = multiply_bfloat16;
    kernels.multiply_float32 = multiply_float32;
    kernels.multiply_float16 = multiply_float16;
    kernels.expand_bfloat16 = expand_panel<BFloat16>;
    kernels.expand_float32 = expand_panel<float>;
    kernels.multiply_strips_bfloat16 = multiply_strips<BFloat16Step>;
    kernels.multiply_strips_float32 = multiply_strips<Float32Step<float>>;
    kernels.looked_up = [](const Strip*) { return false; };
    kernels.quantize = quantize;
    kernels.normalise = normalise;
    kernels.turn = turn;
    kernels.gate = gate;
    kernels.widen = widen;
    kernels.narrow = narrow;
    kernels.largest = [](const float* items, int64_t count) { return largest(items, count); };
    kernels.sampling = {peaks, find, weigh, sum_weights, sum_runs, range, sum_not_below, drop_below,
                        keep_between};
    kernels.attend = attend;
#if defined(__AMX_BF16__)
    kernels.enter = set_whole_tiles;
    kernels.leave = leave_tiles;
    kernels.multiply_bfloat16 = multiply_bfloat16_amx;
    kernels.multiply_strips_bfloat16 = multiply_strips_amx;
    kernels.looked_up = looked_up;
    kernels.multiply_few = multiply_few;
    kernels.pair_up = pair_up;
    kernels.attend = attend_amx;
#endif
    return kernels;
}

}  // namespace tandem::TANDEM_ISA_NAMESPACE
