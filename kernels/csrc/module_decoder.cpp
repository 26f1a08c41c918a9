#include "module_decoder.h"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "arrays.h"
#include "decoder.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tandem {
namespace {

void add_shape(nb::module_& module) {
    nb::class_<DecoderShape>(module, "DecoderShape")
        .def(nb::init<>())
        .def_rw("hidden_size", &DecoderShape::hidden_size)
        .def_rw("intermediate_size", &DecoderShape::intermediate_size)
        .def_rw("num_heads", &DecoderShape::num_heads)
        .def_rw("num_kv_heads", &DecoderShape::num_kv_heads)
        .def_rw("head_dim", &DecoderShape::head_dim)
        .def_rw("vocab_size", &DecoderShape::vocab_size)
        .def_rw("epsilon", &DecoderShape::epsilon)
        .def_rw("score_scale", &DecoderShape::score_scale)
        .def_rw("score_soft_cap", &DecoderShape::score_soft_cap)
        .def_rw("logit_soft_cap", &DecoderShape::logit_soft_cap)
        .def_rw("embedding_scale", &DecoderShape::embedding_scale)
        .def_rw("rotary_scale", &DecoderShape::rotary_scale)
        .def_rw("frequencies", &DecoderShape::frequencies)
        .def_rw("windows", &DecoderShape::windows);
}

void add_layer(nb::module_& module) {
    auto layer = nb::class_<DecoderLayer>(module, "DecoderLayer").def(nb::init<>());
    const auto add_vector = [&](const char* name, Vector DecoderLayer::*field) {
        layer.def_prop_rw(
            name, [field](const DecoderLayer& self) { return self.*field; },
            [field](DecoderLayer& self, Floats items) { self.*field = vector_of(items); });
    };
    add_vector("attention_norm", &DecoderLayer::attention_norm);
    add_vector("query_norm", &DecoderLayer::query_norm);
    add_vector("key_norm", &DecoderLayer::key_norm);
    add_vector("mlp_norm", &DecoderLayer::mlp_norm);
    add_vector("qkv_bias", &DecoderLayer::qkv_bias);
    add_vector("output_bias", &DecoderLayer::output_bias);
    add_vector("gate_up_bias", &DecoderLayer::gate_up_bias);
    add_vector("down_bias", &DecoderLayer::down_bias);
    layer.def_rw("qkv", &DecoderLayer::qkv)
        .def_rw("output", &DecoderLayer::output)
        .def_rw("gate_up", &DecoderLayer::gate_up)
        .def_rw("down", &DecoderLayer::down);
}

// A pool of whole blocks in the caller's memory.
Pool pool_in(const PoolBytes& bytes, const std::string& kind_name, int64_t block_size, const Decoder& decoder) {
    const DecoderShape& shape = decoder.shape();
    Pool pool = {reinterpret_cast<char*>(bytes.data()), kind_named(kind_name), 1, block_size,
                 static_cast<int64_t>(shape.windows.size()), shape.num_kv_heads, shape.head_dim};
    if (block_size < 1) throw std::invalid_argument("a block holds at least one token");
    pool.num_blocks = static_cast<int64_t>(bytes.size()) / pool.block_bytes();
    agree(static_cast<int64_t>(bytes.size()), pool.num_bytes(), "the size of the pool, in whole blocks,");
    return pool;
}

// The decoder's own memory, seen until its next forward.
nb::ndarray<nb::numpy, float, nb::ndim<2>> forward(nb::handle self, Indices tokens, Indices starts, Indices lengths,
                                                   IndexTable block_tables, Indices sampled, PoolBytes pool_bytes,
                                                   const std::string& pool_kind, int64_t block_size) {
    Decoder& decoder = nb::cast<Decoder&>(self);
    const int64_t num_rows = static_cast<int64_t>(lengths.size());
    agree(static_cast<int64_t>(starts.size()), num_rows + 1, "the number of starts");
    agree(static_cast<int64_t>(block_tables.shape(0)), num_rows, "the number of block tables");
    const Batch batch = {tokens.data(),
                                static_cast<int64_t>(tokens.size()),
                                starts.data(),
                                lengths.data(),
                                num_rows,
                                block_tables.data(),
                                static_cast<int64_t>(block_tables.shape(1)),
                                sampled.data(),
                                static_cast<int64_t>(sampled.size())};
    const Pool pool = pool_in(pool_bytes, pool_kind, block_size, decoder);
    Logits logits;
    {
        nb::gil_scoped_release release;
        logits = decoder.forward(batch, pool);
    }
    return {logits.items, {sampled.size(), static_cast<size_t>(decoder.shape().vocab_size)}, self, {logits.stride, 1}};
}

}  // namespace
}  // namespace tandem

void bind_decoder(nb::module_& module) {
    using namespace tandem;
    add_shape(module);
    add_layer(module);
    nb::class_<Decoder>(module, "Decoder")
        .def("__init__",
             [](Decoder* self, const DecoderShape& shape, Weight embedding, std::vector<DecoderLayer> layers,
                Floats norm, Weight head) {
                 new (self) Decoder({shape, std::move(embedding), std::move(layers), vector_of(norm), std::move(head)});
             })
        .def_prop_ro("num_bytes", &Decoder::num_bytes);
    module.attr("Decoder").attr("forward") = nb::cpp_function(
        &forward, nb::is_method(), nb::scope(module.attr("Decoder")), nb::name("forward"), "tokens"_a.noconvert(),
        "starts"_a.noconvert(), "lengths"_a.noconvert(), "block_tables"_a.noconvert(), "sampled"_a.noconvert(),
        "pool"_a.noconvert(), "pool_kind"_a, "block_size"_a);
    module.def("set_threads", [](int num_threads, const std::vector<int>& cores) {
        nb::gil_scoped_release release;
        Threads::shared().set(num_threads, cores);
    });
    module.def("num_threads", [] { return Threads::shared().size(); });
}
