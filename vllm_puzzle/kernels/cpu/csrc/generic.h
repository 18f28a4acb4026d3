// Kernels in float32 for the levels without BF16 products: one source in the compiler's vectors. The including file sets
// PUZZLEMOE_LANES and includes a `CodeReader`, which looks codes up as its level does best.
#pragma once

#include "codes.h"
#include "generic_vectors.h"
#include "pairs.h"
#include "word.h"

namespace {

struct Generic {
    using Act = float;
    static constexpr int kChunk = 12;
    // Of 16 registers three rows of both tiles take 12, of 32 eight rows take 16. Four lanes are too few for both tiles.
    static constexpr int kMostRows = kLanes == 16 ? 8 : kLanes == 8 ? 3 : 4;
    static constexpr int kTilesOfPass = kLanes == 4 ? 1 : 2;
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
                      Ahead) {
        // Passes of even length, as many rows each as their sums leave registers for.
        const int passes = (n + kMostRows - 1) / kMostRows;
        for (int pass = 0; pass < passes; ++pass) {
            const int begin = n * pass / passes, end = n * (pass + 1) / passes;
            pass_of<kMostRows>(end - begin, decoded, steps, a + begin * stride, stride, c + begin * kBlockRows);
        }
    }

    // Beyond, what is decoded is used often enough to be stored.
    static bool takes_coded(int32_t n) { return n <= 2; }

    template <int bits>
    static void coded(const CodeBlock& block, int steps, const float* a, int n, int64_t stride, float* c, uint16_t*) {
        n == 1 ? coded_rows<bits, 1>(block, steps, a, stride, c) : coded_rows<bits, 2>(block, steps, a, stride, c);
    }

    template <int bits>
    static void decode_codes(const CodeBlock& block, int steps, uint16_t* decoded) {
        const CodeReader<bits> reader{block.codebook};
        const uint8_t* codes = block.codes;
        for (int step = 0; step < steps; ++step, codes += step_code_bytes(bits), decoded += kStepWords) {
            prefetch_codes<bits>(block, step, steps);
#pragma GCC unroll 16
            for (int pair = 0; pair < kPairsPerStep; ++pair) {
                Pairs32* first = reinterpret_cast<Pairs32*>(decoded + pair * kPairWords);
                Pairs32* second = reinterpret_cast<Pairs32*>(decoded + kTileWords + pair * kPairWords);
                reader.read(codes, pair, first, second);
            }
        }
    }

   private:
    // A sum waits for its own last product: one row alone gets several sums, which take turns, where there is room.
    template <int bits, int kRows>
    static void coded_rows(const CodeBlock& block, int steps, const float* a, int64_t stride, float* c) {
        constexpr int kTurns = kRows == 1 ? (kLanes == 16 ? 4 : 2) : 1;
        const CodeReader<bits> reader{block.codebook};
        Floats sum[kTurns][kRows][2][kTileVectors] = {};
        const uint8_t* codes = block.codes;
        for (int step = 0; step < steps; ++step, codes += step_code_bytes(bits), a += kStepColumns) {
            prefetch_codes<bits>(block, step, steps);
#pragma GCC unroll 16
            for (int pair = 0; pair < kPairsPerStep; ++pair) {
                Pairs32 weights[2][kTileVectors];
                reader.read(codes, pair, weights[0], weights[1]);
#pragma GCC unroll 2
                for (int tile = 0; tile < 2; ++tile)
#pragma GCC unroll 4
                    for (int v = 0; v < kTileVectors; ++v) {
                        const Floats even = even_column(weights[tile][v]), odd = odd_column(weights[tile][v]);
#pragma GCC unroll 2
                        for (int r = 0; r < kRows; ++r) {
                            const float* x = a + r * stride + 2 * pair;
                            sum[2 * pair % kTurns][r][tile][v] += even * x[0];
                            sum[(2 * pair + 1) % kTurns][r][tile][v] += odd * x[1];
                        }
                    }
            }
        }
        for (int turn = 1; turn < kTurns; ++turn)
            for (int r = 0; r < kRows; ++r)
                for (int tile = 0; tile < 2; ++tile)
                    for (int v = 0; v < kTileVectors; ++v) sum[0][r][tile][v] += sum[turn][r][tile][v];
        std::memcpy(c, sum[0], sizeof(sum[0]));
    }

    template <int kRows>
    static void pass_of(int rows, const uint16_t* decoded, int steps, const float* a, int64_t stride, float* c) {
        if (rows == kRows) {
            for (int tile = 0; tile < 2; tile += kTilesOfPass)
                multiply_rows<kRows>(decoded + tile * kTileWords, steps, a, stride, c + tile * kTileRows);
        } else if constexpr (kRows > 1) {
            pass_of<kRows - 1>(rows, decoded, steps, a, stride, c);
        }
    }

    template <int kRows>
    static void multiply_rows(const uint16_t* tiles, int steps, const float* a, int64_t stride, float* c) {
        Floats sum[kRows][kTilesOfPass][kTileVectors] = {};
        for (int step = 0; step < steps; ++step) {
            const uint16_t* words = tiles + int64_t(step) * kStepWords;
            const float* x = a + step * kStepColumns;
            for (int pair = 0; pair < kPairsPerStep; ++pair, words += kPairWords, x += 2) {
#pragma GCC unroll 2
                for (int tile = 0; tile < kTilesOfPass; ++tile)
#pragma GCC unroll 4
                    for (int v = 0; v < kTileVectors; ++v) {
                        const Pairs32 w = reinterpret_cast<const Pairs32*>(words + tile * kTileWords)[v];
                        const Floats even = even_column(w), odd = odd_column(w);
#pragma GCC unroll 8
                        for (int r = 0; r < kRows; ++r) {
                            sum[r][tile][v] += even * x[r * stride];
                            sum[r][tile][v] += odd * x[r * stride + 1];
                        }
                    }
            }
        }
        for (int r = 0; r < kRows; ++r)
            for (int tile = 0; tile < kTilesOfPass; ++tile)
                std::memcpy(c + r * kBlockRows + tile * kTileRows, sum[r][tile], sizeof(sum[r][tile]));
    }
};

}  // namespace
