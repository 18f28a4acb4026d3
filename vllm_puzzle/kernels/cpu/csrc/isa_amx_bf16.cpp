// AMX: tiles of 16 rows x 32 columns of activations times tiles of decoded words, which are B operands as they lie.
#include "avx512_bf16.h"
#include "codes_vbmi.h"
#include "levels.h"
#include "tile_registers.h"

namespace {

// Decoding, and products that are not worth a tile.
using ByLane = Avx512Bf16<VbmiReader>;

// Tile registers go by their numbers, which the compiler's macros paste into assembly: 0 to 3 are sums, 4 and 5
// activations, 6 and 7 weights.
struct AmxBf16 {
    using Act = uint16_t;
    static constexpr bool kDecodesInRegisters = true;
    // Two tiles of activations by two of weights keep four sums: each loaded tile is used twice.
    static constexpr int kChunk = 32;
    // vdpbf16ps wins while a tile of 16 rows would be mostly empty.
    static constexpr int kMostByLane = 4;
    // K-steps of the ring that few rows are decoded through, and how many the decoder is in front.
    static constexpr int kRing = 4, kLead = 2;

    static void begin() { tiles_begin(); }
    static void end() { tiles_end(); }
    static bool takes_packed(int32_t n0, int32_t n1) { return n0 <= kTileRows && n1 <= kTileRows; }

    // One chunk a member: what is decoded goes through a ring in the L1 cache, two K-steps ahead of the multiplier.
    static void packed(const uint16_t* words, const uint16_t* stream, const uint16_t* next, int steps,
                       const uint16_t* a, int32_t n0, int32_t n1, int64_t stride, float* c, uint16_t* scratch) {
        if (n0 + n1 <= kMostByLane) {
            ByLane::packed(words, stream, next, steps, a, n0, n1, stride, c, scratch);
            return;
        }
        uint16_t* ring[2] = {n0 ? scratch : nullptr, n1 ? scratch + kRing * kStepWords : nullptr};
        const uint16_t* rows1 = a + n0 * stride;
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
        for (int step = 0; step < steps + kLead; ++step) {
            if (step < steps) {
                const int64_t place = int64_t(step % kRing) * kStepWords;
                ByLane::decode_step(words, stream, next, step, steps, n0 ? ring[0] + place : nullptr,
                                    n1 ? ring[1] + place : nullptr);
            }
            const int ready = step - kLead;
            if (ready < 0) continue;
            const int64_t place = int64_t(ready % kRing) * kStepWords;
            if (n0) {
                TILE_LOAD(4, a + ready * kStepColumns, stride * 2);
                TILE_LOAD(6, ring[0] + place, 64);
                TILE_LOAD(7, ring[0] + place + kTileWords, 64);
                TILE_MULTIPLY_ADD(0, 4, 6);
                TILE_MULTIPLY_ADD(1, 4, 7);
            }
            if (n1) {
                TILE_LOAD(5, rows1 + ready * kStepColumns, stride * 2);
                TILE_LOAD(6, ring[1] + place, 64);
                TILE_LOAD(7, ring[1] + place + kTileWords, 64);
                TILE_MULTIPLY_ADD(2, 5, 6);
                TILE_MULTIPLY_ADD(3, 5, 7);
            }
        }
        constexpr int64_t kRowBytes = kBlockRows * sizeof(float);
        // Whole tiles are stored: member 1's, last, overwrite the rows that member 0 does not have.
        TILE_STORE(0, c, kRowBytes);
        TILE_STORE(1, c + kTileRows, kRowBytes);
        TILE_STORE(2, c + n0 * kBlockRows, kRowBytes);
        TILE_STORE(3, c + n0 * kBlockRows + kTileRows, kRowBytes);
    }

    static void decode(const uint16_t* words, const uint16_t* next, int steps, uint16_t* d0, uint16_t* d1) {
        ByLane::decode(words, next, steps, d0, d1);
    }

    static bool takes_coded(int32_t n) { return n <= kTileRows; }

    // As `packed`, for one member.
    template <int bits>
    static void coded(const CodeBlock& block, int steps, const uint16_t* a, int n, int64_t stride, float* c,
                      uint16_t* ring) {
        if (n <= kMostByLane) {
            ByLane::coded<bits>(block, steps, a, n, stride, c, ring);
            return;
        }
        TILE_ZERO(0);
        TILE_ZERO(1);
        for (int step = 0; step < steps + kLead; ++step) {
            if (step < steps)
                ByLane::decode_code_step<bits>(block, step, steps, ring + int64_t(step % kRing) * kStepWords);
            const int ready = step - kLead;
            if (ready < 0) continue;
            const uint16_t* tiles = ring + int64_t(ready % kRing) * kStepWords;
            TILE_LOAD(4, a + ready * kStepColumns, stride * 2);
            TILE_LOAD(6, tiles, 64);
            TILE_LOAD(7, tiles + kTileWords, 64);
            TILE_MULTIPLY_ADD(0, 4, 6);
            TILE_MULTIPLY_ADD(1, 4, 7);
        }
        TILE_STORE(0, c, kBlockRows * sizeof(float));
        TILE_STORE(1, c + kTileRows, kBlockRows * sizeof(float));
    }

    template <int bits>
    static void decode_codes(const CodeBlock& block, int steps, uint16_t* decoded) {
        ByLane::decode_codes<bits>(block, steps, decoded);
    }

    // Rows past n are read (kSpareRows) and their sums left unused.
    static void dense(const uint16_t* decoded, int steps, const uint16_t* a, int n, int64_t stride, float* c,
                      Ahead ahead) {
        constexpr int64_t kRowBytes = kBlockRows * sizeof(float);
        const bool two = n > kTileRows;
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
        for (int step = 0; step < steps; ++step) {
            const uint16_t* tile = decoded + int64_t(step) * kStepWords;
            ByLane::prefetch_step(ahead, step);
            TILE_LOAD(6, tile, 64);
            TILE_LOAD(7, tile + kTileWords, 64);
            TILE_LOAD(4, a + step * kStepColumns, stride * 2);
            TILE_MULTIPLY_ADD(0, 4, 6);
            TILE_MULTIPLY_ADD(1, 4, 7);
            if (two) {
                TILE_LOAD(5, a + kTileRows * stride + step * kStepColumns, stride * 2);
                TILE_MULTIPLY_ADD(2, 5, 6);
                TILE_MULTIPLY_ADD(3, 5, 7);
            }
        }
        TILE_STORE(0, c, kRowBytes);
        TILE_STORE(1, c + kTileRows, kRowBytes);
        if (two) {
            TILE_STORE(2, c + kTileRows * kBlockRows, kRowBytes);
            TILE_STORE(3, c + kTileRows * kBlockRows + kTileRows, kRowBytes);
        }
    }
};

}  // namespace

namespace puzzlemoe {

int64_t run_amx_bf16(const PuzzleMoeCall& call) { return Moe<AmxBf16, Pairs<AmxBf16>>(call, {call}).run(); }
int64_t run_amx_bf16(const PuzzleMoeCodedCall& coded) {
    return Moe<AmxBf16, Codes<AmxBf16>>(coded.call, {coded}).run();
}

}  // namespace puzzlemoe
