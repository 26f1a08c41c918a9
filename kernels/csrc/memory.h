// Aligned, zeroed memory for weights and activations, in huge pages where the system has them.
#pragma once

#include <cstddef>
#include <utility>

namespace tandem {

class Memory {
   public:
    Memory() = default;
    explicit Memory(size_t num_bytes);  // throws std::bad_alloc
    Memory(Memory&& other) noexcept { *this = std::move(other); }
    Memory& operator=(Memory&& other) noexcept {
        std::swap(start_, other.start_);
        std::swap(num_bytes_, other.num_bytes_);
        return *this;
    }
    ~Memory();

    char* data() const { return start_; }
    size_t size() const { return num_bytes_; }

   private:
    char* start_ = nullptr;
    size_t num_bytes_ = 0;
};

}  // namespace tandem
