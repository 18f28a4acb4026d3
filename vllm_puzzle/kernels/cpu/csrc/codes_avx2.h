// Codes looked up by pshufb, 32 at a time: what generic.h asks of a level as `CodeReader`.
#pragma once

#include <immintrin.h>

#include "code_order.h"
#include "generic_vectors.h"

namespace {

template <int bits>
struct CodeReader {
    const uint16_t* codebook;

    // As in codes_portable.h.
    void read(const uint8_t* codes, int pair, Pairs32* first, Pairs32* second) const {
        const __m256i low = shifted(codes, pair, 4);
        const __m256i nibble = _mm256_and_si256(low, _mm256_set1_epi8(15));
        // Blends look at the highest bit of a byte.
        __m256i bit4 = low, bit5 = low;
        if constexpr (bits == 5) bit4 = raised(codes + kHighPlane, pair, 1, 0);
        if constexpr (bits == 6) {
            bit4 = raised(codes + kHighPlane, pair, 2, 0);
            bit5 = raised(codes + kHighPlane, pair, 2, 1);
        }
        Pairs32* const to[2] = {first, second};
#pragma GCC unroll 2
        for (int which = 0; which < 2; ++which) {
            const __m256i halves[2] = {look_up(2 * which, nibble, bit4, bit5),
                                       look_up(2 * which + 1, nibble, bit4, bit5)};
            to[which][0] = Pairs32(_mm256_unpacklo_epi8(halves[0], halves[1]));
            to[which][1] = Pairs32(_mm256_unpackhi_epi8(halves[0], halves[1]));
        }
    }

   private:
    static __m256i load(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }

    // The vector that holds a pair's fields, moved down to them; what a byte gets from its neighbour lies above.
    static __m256i shifted(const uint8_t* plane, int pair, int width) {
        return _mm256_srli_epi16(load(plane + vector_begin(pair, width, 8)), field_shift(pair, width, 8));
    }

    // Bit `bit` of a pair's field, moved up to be the highest of its byte.
    static __m256i raised(const uint8_t* plane, int pair, int width, int bit) {
        return _mm256_slli_epi16(load(plane + vector_begin(pair, width, 8)),
                                 7 - bit - field_shift(pair, width, 8));
    }

    // One half (a byte) of one coordinate of 32 points.
    __m256i look_up(int half, __m256i nibble, __m256i bit4, __m256i bit5) const {
        const uint8_t* table = reinterpret_cast<const uint8_t*>(codebook) + half * kPoints;
        const auto entry = [&](int sixteen) {
            const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 16 * sixteen));
            return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), nibble);
        };
        if constexpr (bits == 4) return entry(0);
        const __m256i below = _mm256_blendv_epi8(entry(0), entry(1), bit4);
        if constexpr (bits == 5) return below;
        return _mm256_blendv_epi8(below, _mm256_blendv_epi8(entry(2), entry(3), bit4), bit5);
    }
};

// 256 points are too many for pshufb: codes are looked up one after the other, a point as one number.
template <>
struct CodeReader<8> {
    const uint16_t* codebook;

    void read(const uint8_t* codes, int pair, Pairs32* first, Pairs32* second) const {
        const uint8_t* even = codes + vector_begin(pair, 8, 8);
        const uint8_t* odd = even + kTileRows;
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const __m256i points[2] = {look_up(even + 8 * half), look_up(odd + 8 * half)};
            first[half] = Pairs32(_mm256_blend_epi16(points[0], _mm256_slli_epi32(points[1], 16), 0xAA));
            second[half] = Pairs32(_mm256_blend_epi16(_mm256_srli_epi32(points[0], 16), points[1], 0xAA));
        }
    }

   private:
    __m256i look_up(const uint8_t* codes) const {
        uint64_t eight;
        std::memcpy(&eight, codes, sizeof(eight));
        return _mm256_set_m128i(four(uint32_t(eight >> 32)), four(uint32_t(eight)));
    }

    __m128i four(uint32_t codes) const {
        __m128i points = _mm_cvtsi32_si128(point(codes & 255));
        points = _mm_insert_epi32(points, point(codes >> 8 & 255), 1);
        points = _mm_insert_epi32(points, point(codes >> 16 & 255), 2);
        return _mm_insert_epi32(points, point(codes >> 24), 3);
    }

    int point(uint32_t code) const {
        int both;
        std::memcpy(&both, codebook + 2 * code, sizeof(both));
        return both;
    }
};

}  // namespace
