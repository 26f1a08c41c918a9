#include "module_weight.h"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "arrays.h"
#include "kernels.h"
#include "quantized.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tandem {
namespace {

using ByteTable = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Weight = std::shared_ptr<const PackedWeight>;

Weight pack_matrix(ItemTable matrix, const std::string& kind_name, bool gated) {
    const Kind kind = kind_named(kind_name);
    agree(static_cast<int64_t>(matrix.itemsize()), static_cast<int64_t>(item_bytes(kind)), "the bytes of an item");
    const Matrix given = {matrix.data(), kind, static_cast<int64_t>(matrix.shape(0)),
                          static_cast<int64_t>(matrix.shape(1))};
    nb::gil_scoped_release release;
    return pack(given, gated);
}

Weight pack_stacked(const std::vector<ItemTable>& items, const std::vector<std::string>& formats, int64_t columns,
                    const std::string& kind, bool gated) {
    agree(static_cast<int64_t>(formats.size()), static_cast<int64_t>(items.size()), "the number of formats");
    std::vector<Part> parts;
    for (size_t i = 0; i < items.size(); i++) {
        const Format format = format_named(formats[i]);
        agree(static_cast<int64_t>(items[i].shape(1) * items[i].itemsize()), row_bytes(format, columns),
              "the bytes of a row");
        parts.push_back({static_cast<const char*>(items[i].data()), format, static_cast<int64_t>(items[i].shape(0))});
    }
    nb::gil_scoped_release release;
    return pack_parts(parts, columns, kind_named(kind), gated);
}

void expand(ItemTable rows, const std::string& format_name, const std::string& kind_name, WritableItemTable result) {
    const Format format = format_named(format_name);
    const Kind kind = kind_named(kind_name);
    const int64_t num_rows = static_cast<int64_t>(result.shape(0)), columns = static_cast<int64_t>(result.shape(1));
    agree(static_cast<int64_t>(result.itemsize()), static_cast<int64_t>(item_bytes(kind)), "the bytes of an item");
    agree(static_cast<int64_t>(rows.shape(0)), num_rows, "the number of rows");
    agree(static_cast<int64_t>(rows.shape(1) * rows.itemsize()), row_bytes(format, columns), "the bytes of a row");
    nb::gil_scoped_release release;
    expand_rows(format, static_cast<const char*>(rows.data()), num_rows, columns, kind,
                static_cast<char*>(result.data()));
}

void quantize(FloatTable matrix, const std::string& format_name, ByteTable result) {
    const Format format = format_named(format_name);
    const int64_t rows = static_cast<int64_t>(matrix.shape(0)), columns = static_cast<int64_t>(matrix.shape(1));
    agree(static_cast<int64_t>(result.shape(0)), rows, "the number of results");
    agree(static_cast<int64_t>(result.shape(1)), row_bytes(format, columns), "the bytes of a row");
    nb::gil_scoped_release release;
    on_all_threads(rows, [&](int64_t row) {
        char* const to = reinterpret_cast<char*>(result.data()) + row * row_bytes(format, columns);
        kernels().quantize(format, matrix.data() + row * columns, columns, to);
    });
}

}  // namespace
}  // namespace tandem

void bind_weight(nb::module_& module) {
    using namespace tandem;
    nb::class_<PackedWeight>(module, "PackedWeight")
        .def_prop_ro("rows", &PackedWeight::rows)
        .def_prop_ro("columns", &PackedWeight::columns)
        .def_prop_ro("gated", &PackedWeight::gated)
        .def_prop_ro("num_bytes", &PackedWeight::num_bytes)
        .def_prop_ro("input_kind", [](const PackedWeight& weight) { return name_of(weight.input_kind()); });
    module.def("pack", &pack_matrix, "matrix"_a.noconvert(), "kind"_a, "gated"_a);
    module.def("expand", &expand, "rows"_a.noconvert(), "format"_a, "kind"_a, "result"_a.noconvert());
    module.def("quantize", &quantize, "matrix"_a.noconvert(), "format"_a, "result"_a.noconvert());
    module.def("pack_parts", &pack_stacked, "items"_a, "formats"_a, "columns"_a, "kind"_a, "gated"_a);
}
