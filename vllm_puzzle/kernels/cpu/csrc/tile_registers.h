// AMX's tile registers, all eight configured as 16 rows of 64 bytes; or, with PUZZLEMOE_EMULATE_TILES, the same in
// plain C++, by which the tests run the AMX kernels on CPUs without AMX, and under sanitizers that see no tile
// instruction.
#pragma once

#include <cstdint>
#include <cstring>

#include "scalar.h"

#ifndef PUZZLEMOE_EMULATE_TILES

#include <immintrin.h>

namespace {

// GCC 12's intrinsics are assembly that does not tell the compiler what memory it reads (amxtileintrin.h): a load names
// none, the configuration's first 8 bytes only. This makes it write what it still holds back.
inline void written_first(const void* place) { __asm__ volatile("" ::"r"(place) : "memory"); }

inline void tiles_begin() {
    struct alignas(64) {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config{};
    static_assert(sizeof(config) == 64, "what ldtilecfg reads");
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
        config.row_bytes[i] = 64;
        config.rows[i] = 16;
    }
    written_first(&config);
    _tile_loadconfig(&config);
}

inline void tiles_end() { _tile_release(); }

}  // namespace

#define TILE_ZERO(tile) _tile_zero(tile)
// clang-format off
#define TILE_LOAD(tile, from, stride) (void)({ written_first(from); _tile_loadd(tile, from, stride); })
// clang-format on
#define TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define TILE_MULTIPLY_ADD(sum, a, b) _tile_dpbf16ps(sum, a, b)

#else

namespace {

struct EmulatedTile {
    unsigned char row[16][64];
};
thread_local EmulatedTile tile_file[8];
thread_local bool tiles_configured = false;

inline void tiles_begin() { tiles_configured = true; }
inline void tiles_end() { tiles_configured = false; }

// What the processor does where no configuration is loaded: #UD.
inline void need_configuration() {
    if (!tiles_configured) __builtin_trap();
}

inline void emulate_zero(int tile) {
    need_configuration();
    std::memset(&tile_file[tile], 0, sizeof(EmulatedTile));
}

inline void emulate_load(int tile, const void* from, int64_t stride) {
    need_configuration();
    for (int r = 0; r < 16; ++r) std::memcpy(tile_file[tile].row[r], static_cast<const char*>(from) + r * stride, 64);
}

inline void emulate_store(int tile, void* to, int64_t stride) {
    need_configuration();
    for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(to) + r * stride, tile_file[tile].row[r], 64);
}

// TDPBF16PS: sum[m][n] += a[m][2 k] * b[k][2 n] + a[m][2 k + 1] * b[k][2 n + 1].
inline void emulate_multiply_add(int sum, int a, int b) {
    need_configuration();
    for (int m = 0; m < 16; ++m) {
        uint16_t left[32];
        float sums[16];
        std::memcpy(left, tile_file[a].row[m], 64);
        std::memcpy(sums, tile_file[sum].row[m], 64);
        for (int k = 0; k < 16; ++k) {
            uint16_t right[32];
            std::memcpy(right, tile_file[b].row[k], 64);
            for (int n = 0; n < 16; ++n) {
                sums[n] += from_bf16(left[2 * k]) * from_bf16(right[2 * n]);
                sums[n] += from_bf16(left[2 * k + 1]) * from_bf16(right[2 * n + 1]);
            }
        }
        std::memcpy(tile_file[sum].row[m], sums, 64);
    }
}

}  // namespace

#define TILE_ZERO(tile) emulate_zero(tile)
#define TILE_LOAD(tile, from, stride) emulate_load(tile, from, stride)
#define TILE_STORE(tile, to, stride) emulate_store(tile, to, stride)
#define TILE_MULTIPLY_ADD(sum, a, b) emulate_multiply_add(sum, a, b)

#endif
