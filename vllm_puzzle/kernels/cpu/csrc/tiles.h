// Tile order, the order in which the kernels consume words.
//
// A matrix is cut into blocks of 32 output rows (w13: 16 gate rows and the 16 up rows that meet them in silu-and-mul)
// and a block into K-steps of 32 columns. A K-step is two tiles of 16 rows, one after the other; a tile is 16 pairs of
// columns x 16 rows x 2 words: 1 KB, the B operand of AMX, and 16 registers of AVX-512 whose 32-bit lanes are what
// vdpbf16ps multiplies. Decoding a block is one linear stream. Codes are decoded into the same tiles (code_order.h).
#pragma once

#include <cstdint>

namespace puzzlemoe {

constexpr int kTileRows = 16;
constexpr int kStepColumns = 32;
constexpr int kBlockRows = 2 * kTileRows;
constexpr int kTileWords = kTileRows * kStepColumns;
constexpr int kStepWords = 2 * kTileWords;
constexpr int kPairsPerStep = kStepColumns / 2;
// Words of one pair of columns in a tile.
constexpr int kPairWords = 2 * kTileRows;

}  // namespace puzzlemoe
