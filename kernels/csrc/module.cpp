// The Python face of the kernels. Shapes and meanings are documented in kernels/cpu.py.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "copy.h"
#include "isa.h"
#include "module_decoder.h"
#include "module_kernels.h"
#include "module_sampling.h"
#include "module_weight.h"

namespace nb = nanobind;

using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstBytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ranges = nb::ndarray<const int64_t, nb::shape<-1, 3>, nb::c_contig, nb::device::cpu>;

static void copy_ranges(ConstBytes source, Bytes destination, Ranges copies) {
    static_assert(sizeof(tandem::Range) == 3 * sizeof(int64_t));
    nb::gil_scoped_release release;
    tandem::copy_ranges(reinterpret_cast<const char*>(source.data()), source.size(),
                        reinterpret_cast<char*>(destination.data()), destination.size(),
                        reinterpret_cast<const tandem::Range*>(copies.data()), copies.shape(0));
}

NB_MODULE(_native, module) {
    nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
        try {
            std::rethrow_exception(thrown);
        } catch (const std::out_of_range& error) {
            PyErr_SetString(PyExc_ValueError, error.what());
        }
    });
    module.def("copy_ranges", &copy_ranges, nb::arg("source").noconvert(),
               nb::arg("destination").noconvert(), nb::arg("copies").noconvert());
    module.def("isa", [] { return tandem::name(tandem::isa()); });
    bind_kernels(module);
    bind_weight(module);
    bind_decoder(module);
    bind_sampling(module);
}
