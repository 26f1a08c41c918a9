#include "kernels.h"

#include "isa.h"

namespace tandem {
namespace {

const Kernels& chosen() {
#if defined(__x86_64__)
    switch (isa()) {
        case Isa::amx: return kernels_amx;
        case Isa::avx512_bf16: return kernels_avx512_bf16;
        case Isa::avx512: return kernels_avx512;
        case Isa::avx2: return kernels_avx2;
        case Isa::sse2:
        case Isa::generic: return kernels_plain;
    }
#endif
    return kernels_plain;
}

}  // namespace

const Kernels& kernels() {
    static const Kernels& table = chosen();
    return table;
}

}  // namespace tandem
