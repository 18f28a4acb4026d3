// Codes looked up by vpermw and vpermi2w, 32 at a time, which AVX512BW has.
//
// Up to 6 bits vpermb of VBMI gains nothing on Zen 4 and next to nothing on Sapphire Rapids: it looks up 64 bytes at
// once, but a weight is two bytes, which shifts and blends then have to join. Uops for 64 codes of 4, 5 and 6 bits,
// counted by llvm-mca 19 without products: on Zen 4, where each of these look-ups is one, 6, 11, 15 by words and 13,
// 16, 16 by bytes; on Sapphire Rapids, where vpermb is one, vpermw two and vpermi2w three, 10, 14.5, 18.5 and
// 13, 15.5, 15.5.
#pragma once

#include <immintrin.h>

#include "code_order.h"

namespace {

using namespace puzzlemoe;

template <int bits>
struct WordReader {
    static constexpr int kPairs = 1;

    const uint16_t* codebook;

    // Decodes `kPairs` pairs of a K-step from `pair` on. weights[i] are 16 rows x 2 columns of the points' first and of
    // their second coordinates, BF16, in tile order.
    void read(const uint8_t* codes, int pair, __m512i (&weights)[kPairs][2]) const {
        __m512i code = field(codes, pair, low_bits(bits));
        // The look-ups take no notice of bits above those that they need.
        if constexpr (bits == 5 || bits == 6) {
            const __m512i high = raised(codes + kHighPlane, pair, bits - 4);
            code = _mm512_ternarylogic_epi32(_mm512_set1_epi16(15), code, high, 0xCA);
        }
        weights[0][0] = look_up(codebook, code);
        weights[0][1] = look_up(codebook + kPoints, code);
    }

   private:
    typedef uint16_t Shifted __attribute__((vector_size(64)));

    static Shifted load(const uint8_t* plane, int pair, int width) {
        return Shifted(_mm512_loadu_si512(plane + vector_begin(pair, width, 16)));
    }

    static __m512i field(const uint8_t* plane, int pair, int width) {
        return (__m512i)(load(plane, pair, width) >> field_shift(pair, width, 16));
    }

    // A field moved to the place of bit 4 and on.
    static __m512i raised(const uint8_t* plane, int pair, int width) {
        const int by = field_shift(pair, width, 16) - 4;
        const Shifted fields = load(plane, pair, width);
        return by < 0 ? (__m512i)(fields << -by) : (__m512i)(fields >> by);
    }

    static __m512i entries(const uint16_t* table, int thirty_two) {
        return _mm512_loadu_si512(table + 32 * thirty_two);
    }

    static __m512i look_up(const uint16_t* table, __m512i code) {
        if constexpr (bits <= 5) return _mm512_permutexvar_epi16(code, entries(table, 0));
        const auto of_64 = [&](int part) {
            return _mm512_permutex2var_epi16(entries(table, 2 * part), code, entries(table, 2 * part + 1));
        };
        if constexpr (bits == 6) return of_64(0);
        const __mmask32 bit6 = _mm512_test_epi16_mask(code, _mm512_set1_epi16(64));
        const __mmask32 bit7 = _mm512_test_epi16_mask(code, _mm512_set1_epi16(128));
        return _mm512_mask_blend_epi16(bit7, _mm512_mask_blend_epi16(bit6, of_64(0), of_64(1)),
                                       _mm512_mask_blend_epi16(bit6, of_64(2), of_64(3)));
    }
};

}  // namespace
