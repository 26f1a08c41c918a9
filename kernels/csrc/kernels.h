// The kernels of one instruction set, as a table; `kernels()` is the one of this machine.
#pragma once

#include "attention.h"
#include "items.h"
#include "sampling_kernels.h"
#include "strip.h"
#include "weight.h"

namespace tandem {

// The turn of one token: rotary pairs are (i, i + half).
struct Turn {
    const float* cos;  // [half]
    const float* sin;  // [half]
    int64_t half;
};

struct Kernels {
    // A thread calls `enter` before it uses the others and `leave` after: the tiles of AMX want setting up, and cost
    // every change of threads until they are let go.
    void (*enter)();
    void (*leave)();

    // One panel for rows [first_row, first_row + num_rows). `steps` of 32 k.
    void (*multiply_bfloat16)(const BFloat16* panel, int64_t steps, const Input&, int64_t first_row, int64_t num_rows,
                              int64_t panel_index, const Output&);
    void (*multiply_float32)(const float* panel, int64_t columns, const Input&, int64_t first_row, int64_t num_rows,
                             int64_t panel_index, const Output&);

    void (*multiply_float16)(const Float16* panel, int64_t columns, const Input&, int64_t first_row, int64_t num_rows,
                             int64_t panel_index, const Output&);

    // The two strips of a panel, made into a dense one; see strip.h.
    void (*expand_bfloat16)(const Strip* strips, int64_t steps, BFloat16* panel);
    void (*expand_float32)(const Strip* strips, int64_t steps, float* panel);

    // What multiply_bfloat16 and multiply_float32 give for the panel that the strips make. `scratch` holds one.
    void (*multiply_strips_bfloat16)(const Strip* strips, int64_t steps, BFloat16* scratch, const Input&,
                                     int64_t first_row, int64_t num_rows, int64_t panel_index, const Output&);
    void (*multiply_strips_float32)(const Strip* strips, int64_t steps, float* scratch, const Input&,
                                    int64_t first_row, int64_t num_rows, int64_t panel_index, const Output&);

    // That of bfloat16 for at most `block_rows` rows from the first, of which `pair_up` made the input's pairs: [16 rows
    // at a time][k / 2][those rows, or 16 where there are more][2]. Where strips are not `looked_up`, it may not be called.
    bool (*looked_up)(const Strip* strips);
    void (*multiply_few)(const Strip* strips, int64_t steps, const Input&, int64_t num_rows, int64_t panel_index,
                         const Output&);
    void (*pair_up)(const Input&, int64_t num_rows, int64_t steps, char* pairs);

    // A row of float32 as the blocks of q8_0, q4_0 or q4_1, which fill it.
    void (*quantize)(Format format, const float* items, int64_t columns, char* row);

    // items / rms(items) * weight, as `kind`.
    void (*normalise)(const float* items, const float* weight, int64_t count, float epsilon, Kind kind, void* result);

    // One head of 2 half items, in place.
    void (*turn)(const Turn&, float* head);

    // silu(gate) up, as `kind`.
    void (*gate)(const float* gate, const float* up, int64_t count, Kind kind, void* result);

    void (*widen)(const void* items, Kind kind, int64_t count, float* result);
    void (*narrow)(const float* items, int64_t count, Kind kind, void* result);

    // The place of the largest item, the first of equals; 0 where no number is above minus infinity.
    int64_t (*largest)(const float* items, int64_t count);

    SamplingKernels sampling;

    // The attention of one piece; see attention.h.
    void (*attend)(const AttentionShape&, const AttentionPiece&, char* scratch);
};

const Kernels& kernels();

// One table for each instruction set that this was built for.
extern const Kernels kernels_plain;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;
extern const Kernels kernels_amx;
#endif

}  // namespace tandem
