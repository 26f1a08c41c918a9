// The tile registers of AMX: all eight set to 16 rows of 64 bytes, but where a kernel says otherwise.
//
// Written in assembly: the compilers' own functions do not say which memory they touch, so that ordinary stores could be
// moved past them.
#pragma once

#include <cstdint>

namespace tandem::TANDEM_ISA_NAMESPACE {

constexpr int64_t tile_rows = 16;
constexpr int64_t tile_row_bytes = 64;
constexpr int64_t tile_bytes = tile_rows * tile_row_bytes;

struct alignas(64) TileShapes {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Of the sets of shapes that kernels use. Setting them takes 200 ns: it is left until others are wanted.
enum class Tiles { none, whole, narrow, few };
static thread_local Tiles tiles_set = Tiles::none;
static thread_local int64_t tiles_width = 0;  // of few

inline void set_tiles(Tiles wanted, const TileShapes& shapes) {
    asm volatile("ldtilecfg %0" : : "m"(shapes));
    tiles_set = wanted;
}
inline void set_whole_tiles() {
    if (tiles_set != Tiles::whole) set_tiles(Tiles::whole, {});
}
inline void leave_tiles() {
    asm volatile("tilerelease");
    tiles_set = Tiles::none;
}

#define TANDEM_TILE_ZERO(tile) asm volatile("tilezero %%tmm" #tile : :)
#define TANDEM_TILE_LOAD(tile, from, stride) \
    asm volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"(static_cast<int64_t>(stride)) : "memory")
#define TANDEM_TILE_STORE(tile, to, stride) \
    asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(to), "r"(static_cast<int64_t>(stride)) : "memory")
// sum[m][n] += Σ of pairs left[m][k] right[k / 2][n][k % 2]
#define TANDEM_TILE_PRODUCT(sum, left, right) \
    asm volatile("tdpbf16ps %%tmm" #right ", %%tmm" #left ", %%tmm" #sum : :)

}  // namespace tandem::TANDEM_ISA_NAMESPACE
