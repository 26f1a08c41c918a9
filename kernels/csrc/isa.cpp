#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace tandem {
namespace {

Isa best() {
#if defined(__x86_64__)
    __builtin_cpu_init();  // asks the operating system too whether it saves the wide registers
    if (__builtin_cpu_supports("avx512f")) return Isa::avx512;
    if (__builtin_cpu_supports("avx2")) return Isa::avx2;
    return Isa::sse2;
#else
    return Isa::generic;  // memcpy is wide everywhere
#endif
}

Isa wanted(const char* text) {
    for (Isa isa : {Isa::generic, Isa::sse2, Isa::avx2, Isa::avx512}) {
        if (std::string(text) == name(isa) && isa <= best()) return isa;
    }
    throw std::invalid_argument(std::string("TANDEM_ISA=") + text + " is unknown or not of this machine, whose best is " +
                                name(best()));
}

}  // namespace

Isa isa() {
    static const Isa chosen = std::getenv("TANDEM_ISA") ? wanted(std::getenv("TANDEM_ISA")) : best();
    return chosen;
}

const char* name(Isa isa) {
    switch (isa) {
        case Isa::generic: return "generic";
        case Isa::sse2: return "sse2";
        case Isa::avx2: return "avx2";
        case Isa::avx512: return "avx512";
    }
    return "unknown";
}

}  // namespace tandem
