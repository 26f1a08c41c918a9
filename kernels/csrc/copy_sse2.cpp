#include "copy_stream.h"

#if defined(__SSE2__)
#include <immintrin.h>

namespace tandem {
namespace {

struct Vector {
    using type = __m128i;
    static type load(const char* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }
    static void stream(char* to, type value) { _mm_stream_si128(reinterpret_cast<__m128i*>(to), value); }
};

}  // namespace

void stream_sse2(char* destination, const char* source, size_t num_bytes) {
    stream<Vector>(destination, source, num_bytes);
    _mm_sfence();  // streaming stores are not ordered with any other
}

}  // namespace tandem
#endif
