#define TANDEM_ISA_NAMESPACE plain
#include "native.h"

namespace tandem {
constexpr Kernels table = plain::table();  // before the program starts: nothing here may run on a lesser machine
const Kernels kernels_plain = table;
}  // namespace tandem
