// Codes of 4 bits made into weights by looking them up: a block of 32 weights has only 16 different ones, which are made
// and rounded once. What comes out is a row of bfloat16 for each column, as the left tiles of products take them.
#pragma once

#include "expand_lanes.h"
#include "tiles_amx.h"

namespace tandem::TANDEM_ISA_NAMESPACE {

// Both strips of a panel are of one such format.
constexpr bool is_looked_up(Format format) {
    return format == Format::q4_0 || format == Format::q4_1 || format == Format::q4_k;
}
inline bool looked_up(const Strip* strips) {
    return is_looked_up(strips[0].format) && strips[0].format == strips[1].format;
}

// The steps of a panel, one after the other. What is stored cannot be loaded again at once, so that scales are made two
// steps before their weights, tables one step before, in the same run of instructions.
template <Format format>
class Lookup {
   public:
    Lookup(const Strip* strips, int64_t steps) : strips_(strips), last_(steps - 1) {
        read_scales(0);
        read_scales(1);
        for (int64_t column = 0; column < panel_columns; column += 2) make_tables(0, column);
    }

    // The next step's weights, [32 columns][32 k]; valid until the one after the next.
    const char* next() {
        const int64_t step = next_++;
        char* const weights = weights_[step % 2];
        read_scales(step + 2);
        for (int64_t strip = 0; strip < 2; strip++) {
            const char* const start = step_at(strips_[strip], format, step);
            prefetch_step<format>(start);
            const char* const codes = start + coding_of(format).num_factors * strip_columns;
#pragma GCC unroll 4
            for (int64_t column = 0; column < strip_columns; column += word_columns) {
                look_up(codes + column / word_columns * word_line_bytes, step, strip * strip_columns + column, weights);
            }
        }
        return weights;
    }

   private:
    static constexpr int64_t table_bytes = 16 * sizeof(BFloat16);
    static constexpr int64_t scales_kept = 4, tables_kept = 2;  // steps, as are all indices; powers of two

    struct alignas(64) StepScales {
        float scale[panel_columns], least[panel_columns];
    };

    void read_scales(int64_t step) {
        StepScales& to = scales_[step % scales_kept];
        const int64_t from = step < last_ ? step : last_;
        for (int64_t strip = 0; strip < 2; strip++) {
            const ColumnScales columns = load_scales<format>(group_at(strips_[strip], format, from),
                                                             step_at(strips_[strip], format, from), 0);
            store(to.scale + strip * strip_columns, columns.scale);
            store(to.least + strip * strip_columns, columns.least);
        }
    }

    // Of two columns.
    void make_tables(int64_t step, int64_t column) {
        const Lanes numbers = {numbers_from<-coding_of(format).centre>()};
        const StepScales& scales = scales_[step % scales_kept];
        const Lanes first = fma(numbers, all(scales.scale[column]), all(scales.least[column]));
        const Lanes second = fma(numbers, all(scales.scale[column + 1]), all(scales.least[column + 1]));
        store(reinterpret_cast<BFloat16*>(table(step, column)), first, second);
    }

    // Of four columns, whose codes are the words of one line; and the tables of the same columns' next step.
    void look_up(const char* line, int64_t step, int64_t column, char* weights) {
        const __m512i words = _mm512_loadu_si512(line);
        make_tables(step + 1, column);
        write(weights, step, column, words);
        write(weights, step, column + 1, _mm512_srli_epi16(words, 4));
        make_tables(step + 1, column + 2);
        write(weights, step, column + 2, _mm512_srli_epi16(words, 8));
        write(weights, step, column + 3, _mm512_srli_epi16(words, 12));
    }

    // A table is there twice, so that bits above a code's four do not matter.
    void write(char* weights, int64_t step, int64_t column, __m512i codes) {
        const __m256i once = _mm256_load_si256(reinterpret_cast<const __m256i*>(table(step, column)));
        _mm512_store_si512(weights + column * tile_row_bytes,
                           _mm512_permutexvar_epi16(codes, _mm512_broadcast_i64x4(once)));
    }

    char* table(int64_t step, int64_t column) { return tables_[step % tables_kept] + column * table_bytes; }

    const Strip* const strips_;
    const int64_t last_;
    int64_t next_ = 0;
    StepScales scales_[scales_kept];
    alignas(64) char tables_[tables_kept][panel_columns * table_bytes];
    alignas(64) char weights_[2][panel_columns * tile_row_bytes];
};

}  // namespace tandem::TANDEM_ISA_NAMESPACE
