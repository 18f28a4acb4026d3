// Kernels for AVX512-BF16: words decoded 32 at a time, codes by `Reader` (WordReader of codes_avx512.h, or another of
// its kind), products and pair sums by vdpbf16ps.
#pragma once

#include <immintrin.h>

#include <utility>

#include "codes.h"
#include "codes_avx512.h"
#include "pairs.h"
#include "word.h"

namespace {

template <template <int bits> class Reader>
struct Avx512Bf16 {
    using Act = uint16_t;
    static constexpr bool kDecodesInRegisters = true;
    // 12 rows x 2 tiles are 24 sums; 32 registers leave room for two tiles and a broadcast.
    static constexpr int kChunk = 12;
    // While one chunk takes all rows, decoding in registers beats storing what was decoded.
    static constexpr int kMostPacked = kChunk;
    // How far ahead words are asked for, in K-steps of 2 KB: about what memory delivers in its own latency.
    static constexpr int kStepsAhead = 2;

    static void begin() {}
    static void end() {}
    static bool takes_packed(int32_t n0, int32_t n1) { return n0 + n1 <= kMostPacked; }

    static void packed(const uint16_t* words, const uint16_t* stream, const uint16_t* next, int steps,
                       const uint16_t* a, int32_t n0, int32_t n1, int64_t stride, float* c, uint16_t*) {
        kPacked[n0][n1](words, stream, next, steps, a, stride, c);
    }

    static void decode(const uint16_t* words, const uint16_t* next, int steps, uint16_t* d0, uint16_t* d1) {
        for (int step = 0; step < steps; ++step) {
            const int64_t place = int64_t(step) * kStepWords;
            decode_step(words, words, next, step, steps, d0 ? d0 + place : nullptr, d1 ? d1 + place : nullptr);
        }
    }

    // Decodes one K-step; `d0` and `d1` are where this step's words go.
    static void decode_step(const uint16_t* words, const uint16_t* stream, const uint16_t* next, int step, int steps,
                            uint16_t* d0, uint16_t* d1) {
        const uint16_t* from = words + int64_t(step) * kStepWords;
        const uint16_t* ahead = words_ahead(stream, next, step, steps);
        for (int i = 0; i < kStepWords; i += kPairWords) {
            _mm_prefetch(reinterpret_cast<const char*>(ahead + i), _MM_HINT_T0);
            const __m512i w = _mm512_loadu_si512(from + i);
            if (d0) _mm512_storeu_si512(d0 + i, member<0>(w));
            if (d1) _mm512_storeu_si512(d1 + i, member<1>(w));
        }
    }

    static void dense(const uint16_t* decoded, int steps, const uint16_t* a, int n, int64_t stride, float* c,
                      Ahead ahead) {
        kDense[n](decoded, steps, a, stride, c, ahead);
    }

    static const uint16_t* words_ahead(const uint16_t* stream, const uint16_t* next, int step, int steps) {
        const int ahead = step + kStepsAhead;
        return ahead < steps ? stream + int64_t(ahead) * kStepWords : next + int64_t(ahead - steps) * kStepWords;
    }

    // Into the L2 cache: a block is as large as most L1 caches.
    static void prefetch_step(Ahead ahead, int step) {
        if (!ahead.place) return;
        const char* lines = ahead.place + int64_t(step) * ahead.step_lines * kCacheLine;
        for (int i = 0; i < ahead.step_lines; ++i) _mm_prefetch(lines + i * kCacheLine, _MM_HINT_T1);
    }

    // Beyond, a code is decoded once for all chunks of rows.
    static constexpr int kMostCoded = 8;
    static bool takes_coded(int32_t n) { return n <= kMostCoded; }

    template <int bits>
    static void coded(const CodeBlock& block, int steps, const uint16_t* a, int n, int64_t stride, float* c,
                      uint16_t*) {
        static constexpr auto kCoded = make_coded<bits>(std::make_integer_sequence<int, kMostCoded>());
        kCoded.rows[n](block, steps, a, stride, c);
    }

    template <int bits>
    static void decode_codes(const CodeBlock& block, int steps, uint16_t* decoded) {
        for (int step = 0; step < steps; ++step)
            decode_code_step<bits>(block, step, steps, decoded + int64_t(step) * kStepWords);
    }

    // Decodes one K-step of codes to `decoded`.
    template <int bits>
    static void decode_code_step(const CodeBlock& block, int step, int steps, uint16_t* decoded) {
        constexpr int kPairs = Reader<bits>::kPairs;
        const Reader<bits> reader{block.codebook};
        const uint8_t* codes = block.codes + step * step_code_bytes(bits);
        prefetch_codes<bits>(block, step, steps);
#pragma GCC unroll 16
        for (int pair = 0; pair < kPairsPerStep; pair += kPairs) {
            __m512i weights[kPairs][2];
            reader.read(codes, pair, weights);
#pragma GCC unroll 2
            for (int i = 0; i < kPairs; ++i, decoded += kPairWords) {
                _mm512_storeu_si512(decoded, weights[i][0]);
                _mm512_storeu_si512(decoded + kTileWords, weights[i][1]);
            }
        }
    }

   private:
    // Four operations for member 0, five for member 1, eight for both: the magnitude is shared.
    template <int which>
    static __m512i member(__m512i w) {
        const __m512i magnitude = _mm512_and_si512(w, _mm512_set1_epi16(kMagnitudeMask));
        const __mmask32 here = _mm512_test_epi16_mask(w, _mm512_set1_epi16(kMask[which]));
        const __m512i bf16 = _mm512_maskz_add_epi16(here, magnitude, _mm512_set1_epi16(kRebias));
        const __m512i sign = which == 0 ? w : _mm512_add_epi16(w, w);
        // bf16 | (sign & 0x8000); the format keeps the sign of an absent weight clear.
        return _mm512_ternarylogic_epi32(bf16, sign, _mm512_set1_epi16(int16_t(kBf16Sign)), 0xF8);
    }

    static __m512 multiply_add(__m512 sum, __m512i weights, __m512i x) {
        return _mm512_dpbf16_ps(sum, bits_as<__m512bh>(x), bits_as<__m512bh>(weights));
    }

    static __m512i broadcast(const uint16_t* two) {
        int32_t value;
        std::memcpy(&value, two, sizeof(value));
        return _mm512_set1_epi32(value);
    }

    template <int kRows0, int kRows1>
    static void packed_rows(const uint16_t* words, const uint16_t* stream, const uint16_t* next, int steps,
                            const uint16_t* a, int64_t stride, float* c) {
        constexpr int kRows = kRows0 + kRows1;
        __m512 sum[kRows > 0 ? kRows : 1][2];
        for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
        for (int step = 0; step < steps; ++step) {
            const uint16_t* tile = words + int64_t(step) * kStepWords;
            const uint16_t* ahead = words_ahead(stream, next, step, steps);
            const uint16_t* x = a + step * kStepColumns;
            for (int pair = 0; pair < kPairsPerStep; ++pair, tile += kPairWords, ahead += 2 * kPairWords, x += 2) {
                _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T0);
                _mm_prefetch(reinterpret_cast<const char*>(ahead + kPairWords), _MM_HINT_T0);
                const __m512i w[2] = {_mm512_loadu_si512(tile), _mm512_loadu_si512(tile + kTileWords)};
                __m512i weights[2][2];
                for (int t = 0; t < 2; ++t) {
                    if (kRows0) weights[0][t] = member<0>(w[t]);
                    if (kRows1) weights[1][t] = member<1>(w[t]);
                }
#pragma GCC unroll 16
                for (int r = 0; r < kRows; ++r) {
                    const __m512i both = broadcast(x + r * stride);
                    for (int t = 0; t < 2; ++t) sum[r][t] = multiply_add(sum[r][t], weights[r >= kRows0][t], both);
                }
            }
        }
        for (int r = 0; r < kRows; ++r)
            for (int t = 0; t < 2; ++t) _mm512_storeu_ps(c + r * kBlockRows + t * kTileRows, sum[r][t]);
    }

    // One row alone would wait for its own last product: it gets several sums in turn.
    template <int bits, int kRows>
    static void coded_rows(const CodeBlock& block, int steps, const uint16_t* a, int64_t stride, float* c) {
        constexpr int kTurns = kRows == 1 ? 4 : kRows == 2 ? 2 : 1;
        constexpr int kPairs = Reader<bits>::kPairs;
        const Reader<bits> reader{block.codebook};
        __m512 sum[kTurns][kRows][2];
        for (int turn = 0; turn < kTurns; ++turn)
            for (int r = 0; r < kRows; ++r) sum[turn][r][0] = sum[turn][r][1] = _mm512_setzero_ps();
        const uint8_t* codes = block.codes;
        for (int step = 0; step < steps; ++step, codes += step_code_bytes(bits), a += kStepColumns) {
            prefetch_codes<bits>(block, step, steps);
#pragma GCC unroll 16
            for (int pair = 0; pair < kPairsPerStep; pair += kPairs) {
                __m512i weights[kPairs][2];
                reader.read(codes, pair, weights);
#pragma GCC unroll 16
                for (int i = 0; i < kPairs * kRows; ++i) {
                    const int of_pair = i / kRows, r = i % kRows;
                    const __m512i both = broadcast(a + r * stride + 2 * (pair + of_pair));
                    __m512(&sums)[2] = sum[(pair + of_pair) % kTurns][r];
                    for (int t = 0; t < 2; ++t) sums[t] = multiply_add(sums[t], weights[of_pair][t], both);
                }
            }
        }
        for (int r = 0; r < kRows; ++r)
            for (int t = 0; t < 2; ++t) {
                __m512 total = sum[0][r][t];
                for (int turn = 1; turn < kTurns; ++turn) total = _mm512_add_ps(total, sum[turn][r][t]);
                _mm512_storeu_ps(c + r * kBlockRows + t * kTileRows, total);
            }
    }

    template <int kRows>
    static void dense_rows(const uint16_t* decoded, int steps, const uint16_t* a, int64_t stride, float* c,
                           Ahead ahead) {
        __m512 sum[kRows][2];
        for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
        for (int step = 0; step < steps; ++step) {
            const uint16_t* tile = decoded + int64_t(step) * kStepWords;
            const uint16_t* x = a + step * kStepColumns;
            prefetch_step(ahead, step);
            for (int pair = 0; pair < kPairsPerStep; ++pair, tile += kPairWords, x += 2) {
                const __m512i w[2] = {_mm512_loadu_si512(tile), _mm512_loadu_si512(tile + kTileWords)};
#pragma GCC unroll 16
                for (int r = 0; r < kRows; ++r) {
                    const __m512i both = broadcast(x + r * stride);
                    for (int t = 0; t < 2; ++t) sum[r][t] = multiply_add(sum[r][t], w[t], both);
                }
            }
        }
        for (int r = 0; r < kRows; ++r)
            for (int t = 0; t < 2; ++t) _mm512_storeu_ps(c + r * kBlockRows + t * kTileRows, sum[r][t]);
    }

    using Packed = void (*)(const uint16_t*, const uint16_t*, const uint16_t*, int, const uint16_t*, int64_t, float*);
    using Dense = void (*)(const uint16_t*, int, const uint16_t*, int64_t, float*, Ahead);
    using Coded = void (*)(const CodeBlock&, int, const uint16_t*, int64_t, float*);

    template <int kRows0, int... kRows1>
    static constexpr void fill_packed(Packed (&row)[kMostPacked + 1], std::integer_sequence<int, kRows1...>) {
        ((row[kRows1] = packed_rows<kRows0, kRows1>), ...);
    }
    template <int... kRows0>
    static constexpr auto make_packed(std::integer_sequence<int, kRows0...>) {
        PackedTable table{};
        (fill_packed<kRows0>(table.row[kRows0], std::make_integer_sequence<int, kMostPacked + 1 - kRows0>()), ...);
        return table;
    }
    template <int... kRows>
    static constexpr auto make_dense(std::integer_sequence<int, kRows...>) {
        return DenseTable{{nullptr, dense_rows<kRows + 1>...}};
    }

    struct CodedTable {
        Coded rows[kMostCoded + 1];
    };
    template <int bits, int... kRows>
    static constexpr CodedTable make_coded(std::integer_sequence<int, kRows...>) {
        return {{nullptr, coded_rows<bits, kRows + 1>...}};
    }

    struct PackedTable {
        Packed row[kMostPacked + 1][kMostPacked + 1];
        const Packed (&operator[](int n0) const)[kMostPacked + 1] { return row[n0]; }
    };
    struct DenseTable {
        Dense rows[kChunk + 1];
        Dense operator[](int n) const { return rows[n]; }
    };
    static const PackedTable kPacked;
    static const DenseTable kDense;
};

template <template <int bits> class Reader>
const typename Avx512Bf16<Reader>::PackedTable Avx512Bf16<Reader>::kPacked =
    make_packed(std::make_integer_sequence<int, kMostPacked + 1>());
template <template <int bits> class Reader>
const typename Avx512Bf16<Reader>::DenseTable Avx512Bf16<Reader>::kDense =
    make_dense(std::make_integer_sequence<int, kChunk>());

}  // namespace
