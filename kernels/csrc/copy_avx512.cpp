#include "copy_stream.h"

#if defined(__AVX512F__)
#include <immintrin.h>

namespace tandem {
namespace {

struct Vector {
    using type = __m512i;
    static type load(const char* from) { return _mm512_loadu_si512(from); }
    static void stream(char* to, type value) { _mm512_stream_si512(reinterpret_cast<__m512i*>(to), value); }
};

}  // namespace

void stream_avx512(char* destination, const char* source, size_t num_bytes) {
    stream<Vector>(destination, source, num_bytes);
    _mm_sfence();  // streaming stores are not ordered with any other
}

}  // namespace tandem
#endif
