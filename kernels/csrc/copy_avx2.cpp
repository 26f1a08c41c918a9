#include "copy_stream.h"

#if defined(__AVX2__)
#include <immintrin.h>

namespace tandem {
namespace {

struct Vector {
    using type = __m256i;
    static type load(const char* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
    static void stream(char* to, type value) { _mm256_stream_si256(reinterpret_cast<__m256i*>(to), value); }
};

}  // namespace

void stream_avx2(char* destination, const char* source, size_t num_bytes) {
    stream<Vector>(destination, source, num_bytes);
    _mm_sfence();  // streaming stores are not ordered with any other
}

}  // namespace tandem
#endif
