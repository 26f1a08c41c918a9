// Copies of byte ranges between two pools, with streaming stores.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tandem {

struct Range {
    int64_t source;       // offset, bytes
    int64_t destination;  // offset, bytes
    int64_t length;       // bytes
};

// Copies every range in order. Ranges of one call must not overlap between source and destination. All bytes are
// visible to other processors when it returns. Throws std::out_of_range before it copies anything when a range does not
// lie inside both buffers.
void copy_ranges(const char* source, size_t source_bytes, char* destination, size_t destination_bytes,
                 const Range* ranges, size_t num_ranges);

// One copy past the caches, for each instruction set: destination aligned to `vector_bytes`, length a multiple of it.
using Stream = void (*)(char* destination, const char* source, size_t num_bytes);
void stream_sse2(char* destination, const char* source, size_t num_bytes);
void stream_avx2(char* destination, const char* source, size_t num_bytes);
void stream_avx512(char* destination, const char* source, size_t num_bytes);

}  // namespace tandem
