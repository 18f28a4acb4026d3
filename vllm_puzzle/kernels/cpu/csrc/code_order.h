// Code order, the order in which the kernels consume codes.
//
// Codes of b bits are cut into blocks of 16 rows and K-steps of 32 columns, as words are (tiles.h); a K-step is 64 b
// bytes. It decodes to two tiles: gate and up of 16 neurons, or 16 even and 16 odd outputs.
//
// A K-step is one or two planes. Codes of 8 bits are one plane; of the others the first plane has the low 4 bits and
// the second the rest, so that no field crosses a byte. A plane is vectors of 32 lanes, a lane for each row and each
// column of a pair; it holds that code's field of several neighbouring pairs of columns, the first pair lowest. Lanes
// are bytes up to AVX2, which looks up bytes (pshufb), and 16-bit words from AVX-512 on, which looks up words (vpermw),
// or the two bytes of 8-bit codes in a word at once (vpermi2b).
#pragma once

#include "abi.h"
#include "tiles.h"

namespace puzzlemoe {

// Functions are static here: a shared copy could be that of a level which this CPU lacks.
constexpr int kLanesOfPair = 2 * kTileRows;
constexpr int kPoints = 256;

static constexpr int64_t step_code_bytes(int bits) { return int64_t(kTileRows) * kStepColumns * bits / 8; }
static constexpr int low_bits(int bits) { return bits == 8 ? 8 : 4; }
// Where the second plane begins, in bytes.
constexpr int kHighPlane = kTileRows * kStepColumns * 4 / 8;

// Where a field of `field` bits of pair `pair` lies in a plane of lanes of `lane_bits` bits.
static constexpr int pairs_of_vector(int field, int lane_bits) { return lane_bits / field; }
static constexpr int vector_begin(int pair, int field, int lane_bits) {
    return pair / pairs_of_vector(field, lane_bits) * kLanesOfPair * lane_bits / 8;
}
static constexpr int field_shift(int pair, int field, int lane_bits) {
    return pair % pairs_of_vector(field, lane_bits) * field;
}

}  // namespace puzzlemoe
