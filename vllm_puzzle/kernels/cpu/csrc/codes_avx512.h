// Codes looked up by vpermw and vpermi2w, 32 at a time, which AVX512BW has; vpermb of VBMI would need two look-ups and an
// interleaving for what these do in one.
#pragma once

#include <immintrin.h>

#include "code_order.h"

namespace {

using namespace puzzlemoe;

template <int bits>
struct WordReader {
    const uint16_t* codebook;

    // Pair `pair` of a K-step: 16 rows x 2 columns of the points' first and second coordinates, BF16, in tile order.
    void read(const uint8_t* codes, int pair, __m512i& first, __m512i& second) const {
        __m512i code = field(codes, pair, low_bits(bits));
        // The look-ups take no notice of bits above those that they need.
        if constexpr (bits == 5 || bits == 6) {
            const __m512i high = raised(codes + kHighPlane, pair, bits - 4);
            code = _mm512_ternarylogic_epi32(_mm512_set1_epi16(15), code, high, 0xCA);
        }
        first = look_up(codebook, code);
        second = look_up(codebook + kPoints, code);
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

    static __m512i entries(const uint16_t* table, int thirty_two) { return _mm512_loadu_si512(table + 32 * thirty_two); }

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
