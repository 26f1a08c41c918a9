#include "copy.h"

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "isa.h"

namespace tandem {
namespace {

// Smaller batches are likely to be read again soon, from the cache; smaller ranges are not worth the fence.
constexpr int64_t stream_batch_bytes = 256 << 10;
constexpr int64_t stream_range_bytes = 1 << 10;
constexpr size_t line_bytes = 64;

bool inside(int64_t offset, int64_t length, size_t size) {
    return offset >= 0 && length >= 0 && static_cast<uint64_t>(offset) <= size &&
           static_cast<uint64_t>(length) <= size - static_cast<uint64_t>(offset);
}

// The sum of all lengths.
int64_t check(size_t source_bytes, size_t destination_bytes, const Range* ranges, size_t num_ranges) {
    int64_t total = 0;
    for (size_t i = 0; i < num_ranges; i++) {
        const Range& range = ranges[i];
        if (!inside(range.source, range.length, source_bytes) ||
            !inside(range.destination, range.length, destination_bytes)) {
            throw std::out_of_range("range " + std::to_string(i) + " lies outside the source of " +
                                    std::to_string(source_bytes) + " or the destination of " +
                                    std::to_string(destination_bytes));
        }
        if (__builtin_add_overflow(total, range.length, &total)) throw std::out_of_range("the ranges' lengths overflow");
    }
    return total;
}

Stream streaming() {
#if defined(__x86_64__)
    switch (isa()) {
        case Isa::amx:
        case Isa::avx512_bf16:
        case Isa::avx512: return stream_avx512;
        case Isa::avx2: return stream_avx2;
        case Isa::sse2: return stream_sse2;
        case Isa::generic: return nullptr;
    }
#endif
    return nullptr;
}

// Head and tail that fill no whole line of the destination go the ordinary way.
void copy_streaming(Stream stream, char* destination, const char* source, size_t num_bytes) {
    const size_t head = -reinterpret_cast<uintptr_t>(destination) % line_bytes;
    const size_t body = (num_bytes - head) / line_bytes * line_bytes;
    std::memcpy(destination, source, head);
    stream(destination + head, source + head, body);
    std::memcpy(destination + head + body, source + head + body, num_bytes - head - body);
}

}  // namespace

void copy_ranges(const char* source, size_t source_bytes, char* destination, size_t destination_bytes,
                 const Range* ranges, size_t num_ranges) {
    const int64_t total = check(source_bytes, destination_bytes, ranges, num_ranges);
    const Stream stream = total >= stream_batch_bytes ? streaming() : nullptr;
    for (size_t i = 0; i < num_ranges; i++) {
        const Range& range = ranges[i];
        if (stream != nullptr && range.length >= stream_range_bytes) {
            copy_streaming(stream, destination + range.destination, source + range.source, range.length);
        } else {
            std::memcpy(destination + range.destination, source + range.source, range.length);
        }
    }
    std::atomic_thread_fence(std::memory_order_seq_cst);  // what the caller reads of the source next, it reads later
}

}  // namespace tandem
