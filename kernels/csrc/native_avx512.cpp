#if defined(__AVX512F__)
#define TANDEM_ISA_NAMESPACE avx512
#include "native.h"

namespace tandem {
constexpr Kernels table = avx512::table();  // before the program starts: nothing here may run on a lesser machine
const Kernels kernels_avx512 = table;
}  // namespace tandem
#endif
