// Aligned, zeroed memory for weights and activations, in huge pages where the system has them.
#pragma once

#include <cstddef>
#include <memory>
#include <utility>

namespace tandem {

class Memory {
   public:
    Memory() = default;
    explicit Memory(size_t num_bytes);  // throws std::bad_alloc

    // For the many weights of a model, of no whole huge pages each: beside those that were made before. Given back when
    // all of its neighbours are.
    static Memory beside_others(size_t num_bytes);

    Memory(Memory&& other) noexcept { *this = std::move(other); }
    Memory& operator=(Memory&& other) noexcept {
        std::swap(start_, other.start_);
        std::swap(num_bytes_, other.num_bytes_);
        std::swap(shared_, other.shared_);
        return *this;
    }
    ~Memory();

    char* data() const { return start_; }
    size_t size() const { return num_bytes_; }

   private:
    char* start_ = nullptr;
    size_t num_bytes_ = 0;
    std::shared_ptr<Memory> shared_;  // what this is a part of
};

}  // namespace tandem
