#if defined(__AMX_BF16__)
#define TANDEM_ISA_NAMESPACE amx
#include "native.h"

namespace tandem {
constexpr Kernels table = amx::table();  // before the program starts: nothing here may run on a lesser machine
const Kernels kernels_amx = table;
}  // namespace tandem
#endif
