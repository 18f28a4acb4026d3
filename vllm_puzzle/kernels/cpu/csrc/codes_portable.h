// Codes decoded one after the other, for any CPU: what generic.h asks of a level as `CodeReader`.
#pragma once

#include "code_order.h"
#include "generic_vectors.h"

namespace {

template <int bits>
struct CodeReader {
    const uint16_t* codebook;

    // Pair `pair` of a K-step: the points' first and second coordinates of 16 rows, BF16, the odd column's above the
    // even one's. Not inline: where loops over pairs are unrolled, it would be compiled for minutes and be no faster.
    __attribute__((noinline)) void read(const uint8_t* codes, int pair, Pairs32* first, Pairs32* second) const {
        uint16_t coordinates[2][kTileRows][2];
        for (int row = 0; row < kTileRows; ++row)
            for (int column = 0; column < 2; ++column) {
                const uint16_t* point = codebook + 2 * code(codes, pair, row, column);
                coordinates[0][row][column] = point[0];
                coordinates[1][row][column] = point[1];
            }
        std::memcpy(first, coordinates[0], sizeof(coordinates[0]));
        std::memcpy(second, coordinates[1], sizeof(coordinates[1]));
    }

   private:
    static int code(const uint8_t* codes, int pair, int row, int column) {
        if constexpr (bits == 8) {
            return codes[vector_begin(pair, 8, 8) + kTileRows * column + row];
        } else {
            const uint8_t* lane = codes + 16 * (row / 4 % 2) + 8 * (row / 8) + 2 * (row % 4) + column;
            const int low = field(lane, pair, 4);
            if constexpr (bits == 4) return low;
            return low | field(lane + kHighPlane, pair, bits - 4) << 4;
        }
    }

    static int field(const uint8_t* lane, int pair, int width) {
        return lane[vector_begin(pair, width, 8)] >> field_shift(pair, width, 8) & ((1 << width) - 1);
    }
};

}  // namespace
