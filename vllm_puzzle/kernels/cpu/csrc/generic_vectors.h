// The compiler's vectors of the levels that compute in float32, PUZZLEMOE_LANES of them in a register.
#pragma once

#include <cstdint>
#include <cstring>

#include "tiles.h"

namespace {

using namespace puzzlemoe;

constexpr int kLanes = PUZZLEMOE_LANES;
// Registers for the 16 rows of a tile.
constexpr int kTileVectors = kTileRows / kLanes;
typedef float Floats __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
// Two BF16 weights of a row: of an even column, and above it of the odd one.
typedef uint32_t Pairs32 __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint16_t Words __attribute__((vector_size(4 * kLanes), aligned(2), may_alias));

inline Floats even_column(Pairs32 weights) { return Floats(weights << 16); }
inline Floats odd_column(Pairs32 weights) { return Floats(weights & 0xFFFF0000u); }

}  // namespace
