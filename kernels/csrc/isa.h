// Which instruction set the kernels use on this machine.
#pragma once

namespace tandem {

// Each includes those before it. avx512: F, BW, DQ and VL. amx: tiles and their bfloat16 products, and VBMI, which every
// processor with tiles has.
enum class Isa { generic, sse2, avx2, avx512, avx512_bf16, amx };

// The best that this processor and its operating system can run, found once. The environment variable TANDEM_ISA asks
// for a lesser one by name; throws std::invalid_argument for a name that is unknown or cannot run here.
Isa isa();

const char* name(Isa isa);

}  // namespace tandem
