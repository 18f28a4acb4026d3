#include "code_order.h"

#include <cstring>

namespace puzzlemoe {
namespace {

int lane_bits(PuzzleMoeIsa isa) { return isa >= PUZZLEMOE_AVX512 ? 16 : 8; }

// The lane of a code of a pair of columns. Words lie as a tile has them. Bytes of looked up halves are interleaved by
// vpunpck, which takes 8 of each half register; 8-bit codes are looked up one after the other, a column's together.
int lane_of(int row, int column, int bits, int lane_bits) {
    if (lane_bits == 16) return 2 * row + column;
    if (bits == 8) return kTileRows * column + row;
    return 16 * (row / 4 % 2) + 8 * (row / 8) + 2 * (row % 4) + column;
}

// The codes of a K-step by pair of columns and lane.
using StepCodes = uint8_t[kPairsPerStep][kLanesOfPair];

// Reads a row's 32 codes from its bit stream.
template <int bits, int lane_bits>
void read_row(const uint8_t* stream, int row, StepCodes& codes) {
    const int lane[2] = {lane_of(row, 0, bits, lane_bits), lane_of(row, 1, bits, lane_bits)};
    for (int eight = 0; eight < kStepColumns / 8; ++eight, stream += bits) {
        uint64_t value = 0;
        std::memcpy(&value, stream, bits);
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j)
            codes[4 * eight + j / 2][lane[j % 2]] = uint8_t(value >> (j * bits) & ((1u << bits) - 1));
    }
}

// Writes the plane of the `field` bits from bit `shift` of every code.
template <int field, int shift, class Lane>
void write_plane(const StepCodes& codes, uint8_t* plane) {
    constexpr int kLaneBits = 8 * sizeof(Lane), kPairs = pairs_of_vector(field, kLaneBits);
    for (int vector = 0; vector < kPairsPerStep / kPairs; ++vector) {
        Lane lanes[kLanesOfPair] = {};
#pragma GCC unroll 16
        for (int pair = 0; pair < kPairs; ++pair)
            for (int lane = 0; lane < kLanesOfPair; ++lane) {
                const unsigned value = codes[vector * kPairs + pair][lane] >> shift & ((1u << field) - 1);
                lanes[lane] = Lane(lanes[lane] | value << (pair * field));
            }
        std::memcpy(plane + vector * sizeof(lanes), lanes, sizeof(lanes));
    }
}

template <int bits, class Lane>
void order_block(const uint8_t* rows, int64_t steps, uint8_t* to) {
    constexpr int kGroupBytes = kStepColumns * bits / 8;
    for (int64_t step = 0; step < steps; ++step, to += step_code_bytes(bits)) {
        StepCodes codes;
        for (int row = 0; row < kTileRows; ++row)
            read_row<bits, 8 * sizeof(Lane)>(rows + (row * steps + step) * kGroupBytes, row, codes);
        write_plane<low_bits(bits), 0, Lane>(codes, to);
        if constexpr (bits == 5 || bits == 6) write_plane<bits - 4, 4, Lane>(codes, to + kHighPlane);
    }
}

template <class Lane>
auto order_of(int bits) {
    switch (bits) {
        case 4: return order_block<4, Lane>;
        case 5: return order_block<5, Lane>;
        case 6: return order_block<6, Lane>;
        default: return order_block<8, Lane>;
    }
}

}  // namespace
}  // namespace puzzlemoe

using namespace puzzlemoe;

void puzzlemoe_order_codes(uint8_t* codes, uint8_t* scratch, int64_t rows, int64_t columns, int32_t bits,
                           PuzzleMoeIsa isa) {
    const int64_t steps = columns / kStepColumns, block_bytes = steps * step_code_bytes(bits);
    std::memcpy(scratch, codes, rows / kTileRows * block_bytes);
    const auto order = lane_bits(isa) == 16 ? order_of<uint16_t>(bits) : order_of<uint8_t>(bits);
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < rows / kTileRows; ++block)
        order(scratch + block * block_bytes, steps, codes + block * block_bytes);
}

// Bytes are looked up in four tables, low and high halves of each coordinate; words in two, each of 32 entries at
// least; where codes are looked up one after the other, a point is one entry.
void puzzlemoe_order_codebook(uint16_t* codebook, int32_t bits, PuzzleMoeIsa isa) {
    uint16_t points[kPoints][2];
    std::memcpy(points, codebook, sizeof(points));
    const bool of_bytes = isa == PUZZLEMOE_AVX2 ? bits != 8 : isa >= PUZZLEMOE_AVX512_VBMI && bits == 8;
    if (of_bytes) {
        uint8_t* tables = reinterpret_cast<uint8_t*>(codebook);
        for (int half = 0; half < 4; ++half)
            for (int i = 0; i < kPoints; ++i)
                tables[half * kPoints + i] = uint8_t(points[i][half / 2] >> (half % 2 * 8));
    } else if (lane_bits(isa) == 16) {
        const int period = bits == 4 ? 16 : kPoints;
        for (int which = 0; which < 2; ++which)
            for (int i = 0; i < kPoints; ++i) codebook[which * kPoints + i] = points[i % period][which];
    }
}
