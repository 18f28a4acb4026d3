// Kernels in float32 for the levels without BF16 products: one source in the compiler's vectors, whose width the
// including file sets as PUZZLEMOE_LANES (float32 lanes of a register).
#pragma once

#include "moe.h"
#include "word.h"

namespace {

constexpr int kLanes = PUZZLEMOE_LANES;
typedef float Floats __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint32_t Pairs __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint16_t Words __attribute__((vector_size(4 * kLanes), aligned(2), may_alias));

struct Generic {
    using Act = float;
    static constexpr int kChunk = 8;
    static constexpr bool kDecodesInRegisters = false;

    static void begin() {}
    static void end() {}

    static void decode(const uint16_t* words, const uint16_t*, int steps, uint16_t* d0, uint16_t* d1) {
        for (int64_t i = 0; i < int64_t(steps) * kStepWords; i += 2 * kLanes) {
            const Words w = *reinterpret_cast<const Words*>(words + i);
            const Words magnitude = (w & kMagnitudeMask) + kRebias;
            if (d0) {
                const Words here = Words((w & kMask[0]) != 0);
                *reinterpret_cast<Words*>(d0 + i) = (magnitude | (w & kBf16Sign)) & here;
            }
            if (d1) {
                const Words here = Words((w & kMask[1]) != 0);
                *reinterpret_cast<Words*>(d1 + i) = (magnitude | ((w + w) & kBf16Sign)) & here;
            }
        }
    }

    static void dense(const uint16_t* decoded, int steps, const float* a, int n, int64_t stride, float* c,
                      const uint16_t*) {
        for (int row = 0; row < n;) {
            const int left = n - row;
            const float* from = a + row * stride;
            float* to = c + row * kBlockRows;
            if (left >= 4) {
                rows<4>(decoded, steps, from, stride, to);
                row += 4;
            } else if (left >= 2) {
                rows<2>(decoded, steps, from, stride, to);
                row += 2;
            } else {
                rows<1>(decoded, steps, from, stride, to);
                row += 1;
            }
        }
    }

   private:
    template <int kRows>
    static void rows(const uint16_t* decoded, int steps, const float* a, int64_t stride, float* c) {
        constexpr int kVectors = kTileRows / kLanes;
        for (int tile = 0; tile < 2; ++tile) {
            Floats sum[kRows][kVectors] = {};
            for (int step = 0; step < steps; ++step) {
                const uint16_t* words = decoded + int64_t(step) * kStepWords + tile * kTileWords;
                const float* x = a + step * kStepColumns;
                for (int pair = 0; pair < kPairsPerStep; ++pair, words += kPairWords, x += 2) {
#pragma GCC unroll 8
                    for (int v = 0; v < kVectors; ++v) {
                        const Pairs w = reinterpret_cast<const Pairs*>(words)[v];
                        const Floats even = Floats(w << 16), odd = Floats(w & 0xFFFF0000u);
#pragma GCC unroll 8
                        for (int r = 0; r < kRows; ++r) sum[r][v] += even * x[r * stride] + odd * x[r * stride + 1];
                    }
                }
            }
            for (int r = 0; r < kRows; ++r)
                for (int v = 0; v < kVectors; ++v)
                    reinterpret_cast<Floats*>(c + r * kBlockRows + tile * kTileRows)[v] = sum[r][v];
        }
    }
};

}  // namespace
