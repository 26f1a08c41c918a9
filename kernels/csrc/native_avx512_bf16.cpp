#if defined(__AVX512BF16__)
#define TANDEM_ISA_NAMESPACE avx512_bf16
#include "native.h"

namespace tandem {
constexpr Kernels table = avx512_bf16::table();  // before the program starts: nothing here may run on a lesser machine
const Kernels kernels_avx512_bf16 = table;
}  // namespace tandem
#endif
