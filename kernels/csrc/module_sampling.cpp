#include "module_sampling.h"

#include "arrays.h"
#include "kernels.h"
#include "sampling.h"
#include "sampling_penalties.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tandem {
namespace {

using LogitTable = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;  // rows may lie apart
using Doubles = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using WritableDoubles = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using WritableDoubleTable = nb::ndarray<double, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using WritableIndices = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using WritableIndexTable = nb::ndarray<int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

Logits row_of(const LogitTable& logits, int64_t row) {
    return {logits.data() + row * logits.stride(0), static_cast<int64_t>(logits.shape(1))};
}

void check(const LogitTable& logits) {
    if (logits.shape(1) == 0) throw std::invalid_argument("there are no logits");
    if (logits.stride(1) != 1 && logits.shape(1) > 1) throw std::invalid_argument("a row's logits must lie in one run");
}

// Below so many logits to look at, this thread is done before the others are awake.
constexpr int64_t worth_sharing = 1 << 20;
constexpr int64_t looks_of_draw = 5;  // what a drawn token costs, in likeliest tokens

template <class Function>
void each_row(int64_t num_rows, int64_t num_looks, Function function) {
    if (num_looks < worth_sharing) {
        for (int64_t row = 0; row < num_rows; row++) function(row);
        return;
    }
    on_all_threads(num_rows, function);
}

void choose_all(LogitTable logits, Floats temperature, Floats min_p, Indices top_k, Doubles top_p, Doubles uniform,
                WritableIndices tokens) {
    check(logits);
    const int64_t num_rows = static_cast<int64_t>(logits.shape(0));
    for (const size_t size : {temperature.size(), min_p.size(), top_k.size(), top_p.size(), uniform.size(), tokens.size()}) {
        agree(static_cast<int64_t>(size), num_rows, "the number of rows");
    }
    nb::gil_scoped_release release;
    each_row(num_rows, static_cast<int64_t>(logits.size()) * looks_of_draw, [&](int64_t i) {
        const Choice choice = {temperature.data()[i], min_p.data()[i], top_k.data()[i], top_p.data()[i], uniform.data()[i]};
        tokens.data()[i] = choose(row_of(logits, i), choice, SamplingMemory::of_this_thread());
    });
}

void find_likeliest(LogitTable logits, WritableIndices tokens) {
    check(logits);
    agree(static_cast<int64_t>(tokens.size()), static_cast<int64_t>(logits.shape(0)), "the number of rows");
    nb::gil_scoped_release release;
    each_row(static_cast<int64_t>(tokens.size()), static_cast<int64_t>(logits.size()), [&](int64_t i) {
        const Logits row = row_of(logits, i);
        tokens.data()[i] = kernels().largest(row.items, row.count);
    });
}

void logprobs_of(LogitTable logits, Indices rows, Indices tokens, WritableDoubles chosen, WritableIndexTable ids,
                 WritableDoubleTable logprobs) {
    check(logits);
    const int64_t num_rows = static_cast<int64_t>(rows.size()), count = static_cast<int64_t>(ids.shape(1));
    for (const size_t size : {tokens.size(), chosen.size(), ids.shape(0), logprobs.shape(0)}) {
        agree(static_cast<int64_t>(size), num_rows, "the number of rows");
    }
    agree(static_cast<int64_t>(logprobs.shape(1)), count, "the number of log-probabilities");
    if (ids.shape(1) > logits.shape(1)) throw std::invalid_argument("there are not so many tokens");
    for (int64_t i = 0; i < num_rows; i++) {
        const int64_t row = rows.data()[i], token = tokens.data()[i];
        const bool known = row >= 0 && row < static_cast<int64_t>(logits.shape(0)) && token >= 0 &&
                           token < static_cast<int64_t>(logits.shape(1));
        if (!known) throw std::out_of_range("a row or a token is out of range");
    }
    nb::gil_scoped_release release;
    each_row(num_rows, num_rows * static_cast<int64_t>(logits.shape(1)) * looks_of_draw, [&](int64_t i) {
        Logprobs found = {0, ids.data() + i * count, logprobs.data() + i * count, count};
        find_logprobs(row_of(logits, rows.data()[i]), tokens.data()[i], SamplingMemory::of_this_thread(), found);
        chosen.data()[i] = found.chosen;
    });
}

void penalize_row(WritableFloats logits, Indices tokens, Indices counts, float repetition, float presence,
                  float frequency, WritableFloats before) {
    const int64_t count = static_cast<int64_t>(tokens.size());
    agree(static_cast<int64_t>(counts.size()), count, "the number of counts");
    agree(static_cast<int64_t>(before.size()), count, "the number of results");
    for (int64_t i = 0; i < count; i++) {
        const bool known = tokens.data()[i] >= 0 && tokens.data()[i] < static_cast<int64_t>(logits.size());
        if (!known) throw std::out_of_range("a token is out of range");
    }
    penalize(logits.data(), tokens.data(), counts.data(), count, {repetition, presence, frequency}, before.data());
}

}  // namespace
}  // namespace tandem

void bind_sampling(nb::module_& module) {
    using namespace tandem;
    module.def("choose", &choose_all, "logits"_a.noconvert(), "temperature"_a.noconvert(), "min_p"_a.noconvert(),
               "top_k"_a.noconvert(), "top_p"_a.noconvert(), "uniform"_a.noconvert(), "tokens"_a.noconvert());
    module.def("likeliest", &find_likeliest, "logits"_a.noconvert(), "tokens"_a.noconvert());
    module.def("logprobs", &logprobs_of, "logits"_a.noconvert(), "rows"_a.noconvert(), "tokens"_a.noconvert(),
               "chosen"_a.noconvert(), "ids"_a.noconvert(), "logprobs"_a.noconvert());
    module.def("penalize", &penalize_row, "logits"_a.noconvert(), "tokens"_a.noconvert(), "counts"_a.noconvert(),
               "repetition"_a, "presence"_a, "frequency"_a, "before"_a.noconvert());
}
