#include "strip.h"

#include "kernels.h"

namespace tandem {
namespace {

constexpr int64_t line_words = 16;

struct Place {
    int64_t group, pair, lane;
};

Place place_of(int64_t k, int64_t column) { return {column / 8, k / 2, column % 8 * 2 + k % 2}; }

void lay_nibble(uint16_t* words, int64_t k, int64_t column, uint32_t code) {
    words[column / word_columns * step_weights + k] |= static_cast<uint16_t>((code & 15) << column % word_columns * 4);
}

void lay_fifth(uint32_t* words, const Place& place, uint32_t code) {
    words[place.lane] |= (code >> 4 & 1) << (4 + 16 * place.group + place.pair) % 32;
}

void lay_fifth_and_sixth(uint32_t* words, const Place& place, uint32_t code) {
    words[place.group * line_words + place.lane] |= (code >> 4 & 3) << (4 + 2 * place.pair) % 32;
}

void lay_code(Format format, char* to, int64_t k, int64_t column, uint8_t code) {
    const int bits = coding_of(format).bits;
    const Place place = place_of(k, column);
    if (bits == 8) {
        to[(place.pair * 2 + place.group) * 16 + place.lane] = static_cast<char>(code);
        return;
    }
    lay_nibble(reinterpret_cast<uint16_t*>(to), k, column, code);
    uint32_t* const high = reinterpret_cast<uint32_t*>(to + strip_columns / word_columns * word_line_bytes);
    if (bits == 5) lay_fifth(high, place, code);
    if (bits == 6) lay_fifth_and_sixth(high, place, code);
}

}  // namespace

void lay_codes(const Strip& strip, int64_t step, int64_t column, const Codes& codes) {
    const Coding coding = coding_of(strip.format);
    uint16_t* const header = reinterpret_cast<uint16_t*>(group_at(strip, strip.format, step));
    header[column] = codes.scale;
    if (coding.has_least) header[strip_columns + column] = codes.least;
    char* to = step_at(strip, strip.format, step);
    for (int64_t i = 0; i < coding.num_factors; i++, to += strip_columns) {
        to[column] = static_cast<char>(codes.factors[i]);
    }
    for (int64_t k = 0; k < step_weights; k++) lay_code(strip.format, to, k, column, codes.codes[k]);
}

void lay_items(const Strip& strip, int64_t step, int64_t column, const float* items, int64_t count) {
    const Kind kind = kind_of(strip.format);
    const int64_t size = static_cast<int64_t>(item_bytes(kind));
    char* const to = step_at(strip, strip.format, step);
    char narrowed[step_weights * sizeof(float)];
    kernels().narrow(items, count, kind, narrowed);
    for (int64_t k = 0; k < count; k++) memcpy(to + place_in_step(k, column) * size, narrowed + k * size, size);
}

}  // namespace tandem
