#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tandem {
namespace {

#if defined(__x86_64__)
// The operating system saves the tiles only of a process that has asked it to.
bool tiles_granted() {
#if defined(__linux__)
    constexpr long ask_for_component = 0x1023, tile_data = 18;  // arch_prctl's ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, ask_for_component, tile_data) == 0;
#else
    return false;
#endif
}

// Asked of the processor itself: compilers learned these names at different times.
bool has_feature(unsigned leaf_part, unsigned reg, unsigned bit) {
    unsigned found[4] = {};
    if (!__get_cpuid_count(7, leaf_part, &found[0], &found[1], &found[2], &found[3])) return false;
    return found[reg] >> bit & 1;
}

bool has_avx512_bf16() { return has_feature(1, 0, 5); }
bool has_amx() {
    const bool tiles = has_feature(0, 3, 22) && has_feature(0, 3, 24), byte_permutations = has_feature(0, 2, 1);
    return tiles && byte_permutations && tiles_granted();
}

Isa best() {
    __builtin_cpu_init();  // asks the operating system too whether it saves the wide registers
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && has_avx512_bf16()) return has_amx() ? Isa::amx : Isa::avx512_bf16;
    if (avx512) return Isa::avx512;
    return avx2 ? Isa::avx2 : Isa::sse2;
}
#else
Isa best() { return Isa::generic; }  // the compiler's own vectors: NEON where that is every machine's
#endif

Isa wanted(const char* text) {
    for (Isa isa : {Isa::generic, Isa::sse2, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx}) {
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
        case Isa::avx512_bf16: return "avx512_bf16";
        case Isa::amx: return "amx";
    }
    return "unknown";
}

}  // namespace tandem
