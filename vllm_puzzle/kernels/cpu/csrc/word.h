// The packed word, from vllm_puzzle/format/layout.py: the build passes its constants, nothing is written down twice.
#pragma once

#include <cstdint>

#if !defined(PUZZLEMOE_SIGN_BITS) || !defined(PUZZLEMOE_MASK_BITS) || !defined(PUZZLEMOE_MAGNITUDE_MASK) || \
    !defined(PUZZLEMOE_REBIAS) || !defined(PUZZLEMOE_MANTISSA_BITS)
#error "compile through vllm_puzzle/kernels/cpu/build.py, which passes the word's layout"
#endif

namespace puzzlemoe {

constexpr int kSignBits[2] = {PUZZLEMOE_SIGN_BITS};
constexpr int kMaskBits[2] = {PUZZLEMOE_MASK_BITS};
constexpr uint16_t kMask[2] = {uint16_t(1u << kMaskBits[0]), uint16_t(1u << kMaskBits[1])};
constexpr uint16_t kMagnitudeMask = PUZZLEMOE_MAGNITUDE_MASK;
constexpr uint16_t kRebias = PUZZLEMOE_REBIAS;
constexpr int kMantissaBits = PUZZLEMOE_MANTISSA_BITS;
constexpr uint16_t kBf16Sign = 0x8000;
// How far left a member's sign moves to become the sign of a BF16 number.
constexpr int kSignShift[2] = {15 - kSignBits[0], 15 - kSignBits[1]};
static_assert(kSignShift[0] == 0 && kSignShift[1] == 1, "the kernels add a word to itself to move the second sign");

}  // namespace puzzlemoe
