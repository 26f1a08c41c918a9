// NumPy arrays as the kernels take them. bfloat16, which NumPy lacks, comes as the uint16 of its bits.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "items.h"

namespace tandem {

namespace nb = nanobind;

using Indices = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using IndexTable = nb::ndarray<const int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatTable = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using WritableFloats = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using WritableFloatTable = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using WritableFloatCube = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using ItemTable = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using WritableItemTable = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using PoolBytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

inline std::vector<float> vector_of(const Floats& items) { return {items.data(), items.data() + items.size()}; }

inline Kind kind_named(const std::string& name) {
    if (name == "float32") return Kind::float32;
    if (name == "bfloat16") return Kind::bfloat16;
    if (name == "float16") return Kind::float16;
    throw std::invalid_argument("unknown kind " + name + ": expected float32, bfloat16 or float16");
}

inline const char* name_of(Kind kind) {
    switch (kind) {
        case Kind::float32: return "float32";
        case Kind::bfloat16: return "bfloat16";
        case Kind::float16: return "float16";
    }
    return "unknown";
}

// Throws std::invalid_argument where two sizes that must agree do not.
inline void agree(int64_t found, int64_t expected, const char* what) {
    if (found == expected) return;
    throw std::invalid_argument(std::string(what) + " is " + std::to_string(found) + ", expected " +
                                std::to_string(expected));
}

}  // namespace tandem
