// Codes of 8 bits looked up by vpermi2b of VBMI, 64 at a time: two of them read a table of 256 bytes, where one of 256
// words takes four vpermi2w for half as many codes. Uops as counted in codes_avx512.h: 23 instead of 66 on Zen 4, 35
// instead of 82 on Sapphire Rapids.
#pragma once

#include <type_traits>

#include "codes_avx512.h"

namespace {

struct ByteReader {
    static constexpr int kPairs = 2;

    const uint16_t* codebook;  // four tables of bytes (code_order.cpp)

    // As WordReader's. A vector of the plane has the codes of `pair` in even bytes, those of the next in odd ones.
    void read(const uint8_t* codes, int pair, __m512i (&weights)[kPairs][2]) const {
        constexpr __mmask64 kOdd = 0xAAAAAAAAAAAAAAAA;
        const __m512i code = _mm512_loadu_si512(codes + vector_begin(pair, 8, 16));
        const __mmask64 upper = _mm512_movepi8_mask(code);
#pragma GCC unroll 2
        for (int which = 0; which < 2; ++which) {
            const __m512i low = look_up(2 * which, code, upper), high = look_up(2 * which + 1, code, upper);
            weights[0][which] = _mm512_mask_blend_epi8(kOdd, low, _mm512_slli_epi16(high, 8));
            weights[1][which] = _mm512_mask_blend_epi8(kOdd, _mm512_srli_epi16(low, 8), high);
        }
    }

   private:
    // A half (a byte) of a coordinate. What the first look-up leaves as it was are codes for the second.
    __m512i look_up(int half, __m512i code, __mmask64 upper) const {
        const __m512i mixed = _mm512_mask2_permutex2var_epi8(entries(half, 0), code, ~upper, entries(half, 1));
        return _mm512_mask2_permutex2var_epi8(entries(half, 2), mixed, upper, entries(half, 3));
    }

    __m512i entries(int half, int sixty_four) const {
        return _mm512_loadu_si512(reinterpret_cast<const uint8_t*>(codebook) + half * kPoints + 64 * sixty_four);
    }
};

template <int bits>
using VbmiReader = std::conditional_t<bits == 8, ByteReader, WordReader<bits>>;

}  // namespace
