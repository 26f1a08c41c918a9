#include "memory.h"

#include <sys/mman.h>

#include <cstdint>
#include <mutex>
#include <new>

namespace tandem {
namespace {

constexpr size_t huge_page_bytes = 2 << 20;
constexpr size_t shared_bytes = 32 << 20;
constexpr size_t line_bytes = 64;

size_t whole_pages(size_t num_bytes) { return (num_bytes + huge_page_bytes - 1) / huge_page_bytes * huge_page_bytes; }

void* map(size_t num_bytes) {
    void* const start = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) throw std::bad_alloc();
    return start;
}

}  // namespace

// Small pages stop the processor's prefetching every 4 KiB and cost a table walk each: streaming weights wants neither.
Memory::Memory(size_t num_bytes) : num_bytes_(whole_pages(num_bytes)) {
    if (num_bytes_ == 0) return;
    char* const raw = static_cast<char*>(map(num_bytes_ + huge_page_bytes));
    const size_t head = -reinterpret_cast<uintptr_t>(raw) % huge_page_bytes;
    start_ = raw + head;
    if (head > 0) munmap(raw, head);
    munmap(start_ + num_bytes_, huge_page_bytes - head);
#if defined(MADV_HUGEPAGE)
    madvise(start_, num_bytes_, MADV_HUGEPAGE);
#endif
}

Memory Memory::beside_others(size_t num_bytes) {
    static std::mutex one_at_a_time;
    static std::weak_ptr<Memory> latest;
    static size_t used = 0;  // of the latest
    if (num_bytes > shared_bytes / 2) return Memory(num_bytes);
    const std::lock_guard<std::mutex> guard(one_at_a_time);
    Memory part;
    part.shared_ = latest.lock();
    if (part.shared_ == nullptr || used + num_bytes > shared_bytes) {
        part.shared_ = std::make_shared<Memory>(shared_bytes);
        latest = part.shared_;
        used = 0;
    }
    part.start_ = part.shared_->data() + used;
    part.num_bytes_ = num_bytes;
    used += (num_bytes + line_bytes - 1) / line_bytes * line_bytes;
    return part;
}

Memory::~Memory() {
    if (start_ != nullptr && shared_ == nullptr) munmap(start_, num_bytes_);
}

}  // namespace tandem
