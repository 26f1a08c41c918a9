#if defined(__AVX2__)
#define TANDEM_ISA_NAMESPACE avx2
#include "native.h"

namespace tandem {
constexpr Kernels table = avx2::table();  // before the program starts: nothing here may run on a lesser machine
const Kernels kernels_avx2 = table;
}  // namespace tandem
#endif
