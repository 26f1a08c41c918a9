#include "module_kernels.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <optional>

#include "arrays.h"
#include "kernels.h"
#include "plan.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tandem {
namespace {

// On all threads, each piece once.
template <class Function>
void each_of(int64_t num_pieces, Function function) {
    Threads::shared().run([&](Team& team, int member) {
        kernels().enter();
        team.each(member, num_pieces, [&](int64_t piece) { function(piece, member); });
        kernels().leave();
    });
}

// The rows as products take them: of the weights' input kind, zero up to whole steps and blocks.
Memory padded(const FloatTable& rows, Kind kind, int64_t row_bytes) {
    const int64_t num_rows = static_cast<int64_t>(rows.shape(0)), columns = static_cast<int64_t>(rows.shape(1));
    Memory memory(std::max<int64_t>(rounded_up(num_rows, block_rows) * row_bytes, 1));
    for (int64_t i = 0; i < num_rows; i++) {
        kernels().narrow(rows.data() + i * columns, columns, kind, memory.data() + i * row_bytes);
    }
    return memory;
}

void multiply(const PackedWeight& weight, FloatTable rows, WritableFloatTable result) {
    agree(static_cast<int64_t>(rows.shape(1)), weight.columns(), "the number of columns");
    agree(static_cast<int64_t>(result.shape(0)), static_cast<int64_t>(rows.shape(0)), "the number of results");
    agree(static_cast<int64_t>(result.shape(1)), weight.num_outputs(), "the width of the results");
    nb::gil_scoped_release release;
    const int64_t num_rows = static_cast<int64_t>(rows.shape(0));
    const Kind kind = weight.gated() ? weight.input_kind() : Kind::float32;
    const int64_t row_bytes = rounded_up(weight.columns(), input_step) * static_cast<int64_t>(item_bytes(weight.input_kind()));
    const int64_t stride = weight.num_panels() * panel_columns;
    const Memory input = padded(rows, weight.input_kind(), row_bytes);
    const Memory output(std::max<int64_t>(num_rows * stride * static_cast<int64_t>(sizeof(float)), 1));
    const Output to = {weight.gated() ? Finish::gate : Finish::store, kind, output.data(), stride, nullptr};
    each_of(weight.num_panels(), [&](int64_t panel, int) {
        if (num_rows == 0) return;
        weight.multiply(weight.prepared({input.data(), row_bytes}, num_rows), 0, num_rows, panel, to);
    });
    for (int64_t i = 0; i < num_rows; i++) {
        const char* const from = output.data() + i * stride * static_cast<int64_t>(item_bytes(kind));
        kernels().widen(from, kind, weight.num_outputs(), result.data() + i * weight.num_outputs());
    }
}

void embed(const PackedWeight& weight, Indices ids, WritableFloatTable result) {
    agree(static_cast<int64_t>(result.shape(0)), static_cast<int64_t>(ids.size()), "the number of results");
    agree(static_cast<int64_t>(result.shape(1)), weight.columns(), "the width of the results");
    if (weight.gated()) throw std::invalid_argument("gated weights are no embedding");
    for (size_t i = 0; i < ids.size(); i++) {
        if (ids.data()[i] < 0 || ids.data()[i] >= weight.rows()) throw std::out_of_range("an id is out of range");
    }
    nb::gil_scoped_release release;
    for (size_t i = 0; i < ids.size(); i++) weight.row(ids.data()[i], result.data() + i * weight.columns());
}

void normalise(FloatTable rows, Floats weight, float epsilon, WritableFloatTable result) {
    const int64_t columns = static_cast<int64_t>(rows.shape(1));
    agree(static_cast<int64_t>(weight.size()), columns, "the size of the weight");
    agree(static_cast<int64_t>(result.size()), static_cast<int64_t>(rows.size()), "the size of the result");
    for (size_t i = 0; i < rows.shape(0); i++) {
        const float* const row = rows.data() + i * columns;
        kernels().normalise(row, weight.data(), columns, epsilon, Kind::float32, result.data() + i * columns);
    }
}

void turn(WritableFloatCube heads, FloatTable cos, FloatTable sin) {
    const int64_t num_heads = static_cast<int64_t>(heads.shape(1)), half = static_cast<int64_t>(heads.shape(2)) / 2;
    for (const FloatTable* table : {&cos, &sin}) {
        agree(static_cast<int64_t>(table->shape(0)), static_cast<int64_t>(heads.shape(0)), "the number of turns");
        agree(static_cast<int64_t>(table->shape(1)), half, "half of the head's size");
    }
    for (int64_t i = 0; i < static_cast<int64_t>(heads.shape(0)) * num_heads; i++) {
        const int64_t token = i / num_heads;
        kernels().turn({cos.data() + token * half, sin.data() + token * half, half}, heads.data() + i * 2 * half);
    }
}

void gate(Floats gates, Floats values, WritableFloats result) {
    agree(static_cast<int64_t>(values.size()), static_cast<int64_t>(gates.size()), "the number of values");
    agree(static_cast<int64_t>(result.size()), static_cast<int64_t>(gates.size()), "the size of the result");
    kernels().gate(gates.data(), values.data(), static_cast<int64_t>(gates.size()), Kind::float32, result.data());
}

int64_t largest(Floats items) { return kernels().largest(items.data(), static_cast<int64_t>(items.size())); }

// A pool in the caller's memory: [block, layer, 2, kv_head, token, dim].
using PoolItems = nb::ndarray<nb::ndim<6>, nb::c_contig, nb::device::cpu>;

Pool pool_of(const PoolItems& items, const std::string& kind_name) {
    const Kind kind = kind_named(kind_name);
    agree(static_cast<int64_t>(items.itemsize()), static_cast<int64_t>(item_bytes(kind)), "the bytes of an item");
    agree(static_cast<int64_t>(items.shape(2)), 2, "the third size of the pool");
    const auto size = [&](size_t axis) { return static_cast<int64_t>(items.shape(axis)); };
    return {static_cast<char*>(items.data()), kind, size(0), size(4), size(1), size(3), size(5)};
}

void attend(WritableFloatCube queries, FloatTable keys, FloatTable values, Indices starts, Indices lengths,
            IndexTable block_tables, PoolItems pool_items, const std::string& pool_kind, int64_t layer, float scale,
            float soft_cap, int64_t window, WritableFloatCube result) {
    const Pool pool = pool_of(pool_items, pool_kind);
    const int64_t num_tokens = static_cast<int64_t>(queries.shape(0)), num_heads = static_cast<int64_t>(queries.shape(1));
    agree(static_cast<int64_t>(queries.shape(2)), pool.head_dim, "the size of a head");
    agree(num_heads % std::max<int64_t>(pool.num_kv_heads, 1), 0, "heads left over");
    agree(static_cast<int64_t>(result.size()), static_cast<int64_t>(queries.size()), "the size of the result");
    agree(static_cast<int64_t>(starts.size()), static_cast<int64_t>(lengths.size()) + 1, "the number of starts");
    agree(static_cast<int64_t>(block_tables.shape(0)), static_cast<int64_t>(lengths.size()), "the number of tables");
    for (const FloatTable* side : {&keys, &values}) {
        agree(static_cast<int64_t>(side->shape(0)), num_tokens, "the number of keys or values");
        agree(static_cast<int64_t>(side->shape(1)), pool.num_kv_heads * pool.head_dim, "their width");
    }
    if (layer < 0 || layer >= pool.num_layers) throw std::out_of_range("the pool has no such layer");
    const std::vector<int64_t> tokens(num_tokens, 0);
    const Batch batch = {tokens.data(),  num_tokens,
                         starts.data(),  lengths.data(), static_cast<int64_t>(lengths.size()),
                         block_tables.data(), static_cast<int64_t>(block_tables.shape(1)), nullptr, 0};
    check_batch(batch, pool, 1);
    nb::gil_scoped_release release;
    const int num_threads = Threads::shared().size();
    const AttentionPlan plan(batch, pool, num_heads);
    const int64_t row_items = num_heads * pool.head_dim;
    const HeadRows from = {reinterpret_cast<char*>(queries.data()), Kind::float32, row_items};
    const HeadRows to = {reinterpret_cast<char*>(result.data()), Kind::float32, row_items};
    AttentionShape scratch_shape = {};
    scratch_shape.head_dim = pool.head_dim;
    scratch_shape.share = num_heads / pool.num_kv_heads;
    const int64_t scratch_bytes = attention_scratch_bytes(scratch_shape);
    const Memory scratch(scratch_bytes * num_threads);
    std::vector<float> parts(plan.part_floats());
    for (int64_t i = 0; i < num_tokens * pool.num_kv_heads; i++) {
        char* const place = plan.place(i / pool.num_kv_heads, layer, i % pool.num_kv_heads);
        kernels().narrow(keys.data() + i * pool.head_dim, pool.head_dim, pool.kind, place);
        kernels().narrow(values.data() + i * pool.head_dim, pool.head_dim, pool.kind, place + pool.side_bytes());
    }
    each_of(static_cast<int64_t>(plan.pieces().size()), [&](int64_t piece, int member) {
        plan.attend(plan.pieces()[piece], layer, {scale, soft_cap, window}, from, to, parts.data(),
                    scratch.data() + member * scratch_bytes);
    });
    for (const Piece& piece : plan.merges()) plan.merge(piece, to, parts.data());
}

}  // namespace
}  // namespace tandem

void bind_kernels(nb::module_& module) {
    using namespace tandem;
    module.def("multiply", &multiply, "weight"_a, "rows"_a.noconvert(), "result"_a.noconvert());
    module.def("embed", &embed, "weight"_a, "ids"_a.noconvert(), "result"_a.noconvert());
    module.def("normalise", &normalise, "rows"_a.noconvert(), "weight"_a.noconvert(), "epsilon"_a,
               "result"_a.noconvert());
    module.def("turn", &turn, "heads"_a.noconvert(), "cos"_a.noconvert(), "sin"_a.noconvert());
    module.def("gate", &gate, "gates"_a.noconvert(), "values"_a.noconvert(), "result"_a.noconvert());
    module.def("largest", &largest, "items"_a.noconvert());
    module.def("attend", &attend, "queries"_a.noconvert(), "keys"_a.noconvert(), "values"_a.noconvert(),
               "starts"_a.noconvert(), "lengths"_a.noconvert(), "block_tables"_a.noconvert(), "pool"_a.noconvert(),
               "pool_kind"_a, "layer"_a, "scale"_a, "soft_cap"_a, "window"_a, "result"_a.noconvert());
}
