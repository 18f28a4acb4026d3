// Merging and packing a block of rows of two matrices in one pass over them.
//
// The rules are those of elements.py, operation by operation in float32, and the words those of format/words.py, so that
// a block comes out bit for bit as torch makes it. Sums are kept in lanes of their own, in an order that the code and
// not the machine decides.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "word.h"

namespace {

using puzzlemoe::kMagnitudeMask;
using puzzlemoe::kMantissaBits;
using puzzlemoe::kMask;
using puzzlemoe::kRebias;
using puzzlemoe::kSignBits;

constexpr int kLanes = 16;
// As BF16 bits: half the smallest magnitude that a word can hold, that magnitude, and the largest.
constexpr int32_t kHalfSmallest = kRebias, kSmallest = kRebias + (1 << kMantissaBits),
                  kLargest = kRebias + kMagnitudeMask;

struct Sums {
    int64_t refused, shared, kept;
    double squared_error, squared_weight;
};

struct Choice {
    float magnitude;
    bool first, second;
};

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// `condition ? first : second` by masks: GCC turns some of those into branches, and then vectorizes nothing.
inline float choose(bool condition, float first, float second) {
    const uint32_t mask = 0u - uint32_t(condition);
    return float_of((bits_of(first) & mask) | (bits_of(second) & ~mask));
}

// `paper_rule`.
struct Paper {
    float tau;

    Choice operator()(float first, float second, float norm0, float norm1) const {
        const float total = first + second, mean = total * 0.5f;
        const bool similar = std::fabs(first - second) / total <= tau;
        const bool salient = first * norm0 >= second * norm1;
        return {choose(similar, mean, choose(salient, first, second)), bool(similar | salient),
                bool(similar | !salient)};
    }
};

// `cheapest`.
struct Cheapest {
    Choice operator()(float first, float second, float c0, float c1) const {
        const float sum = c0 + c1, tiny = std::numeric_limits<float>::min();
        const float portion = c1 / (sum < tiny ? tiny : sum), difference = first - second;
        const float share = c0 * portion * (difference * difference);
        const float without_second = c1 * (second * second), without_first = c0 * (first * first);
        const bool shared = (share <= without_first) & (share <= without_second);
        const bool keeps_first = without_second <= without_first;
        const float mean = first + portion * (second - first);
        return {choose(shared, mean, choose(keeps_first, first, second)), bool(shared | keeps_first),
                bool(shared | !keeps_first)};
    }
};

template <typename Rule>
[[gnu::always_inline]] inline void pack_row(const Rule rule, const float* __restrict w0, const float* __restrict w1,
                                            float row0, float row1, const float* __restrict column0,
                                            const float* __restrict column1, int64_t columns, int16_t* __restrict words,
                                            Sums& sums) {
    float error[kLanes] = {}, weight[kLanes] = {};
    int32_t refused = 0, shared = 0, kept = 0;
    for (int64_t start = 0; start < columns; start += kLanes) {
        const int64_t count = columns - start < kLanes ? columns - start : kLanes;
#pragma GCC ivdep
        for (int64_t lane = 0; lane < count; ++lane) {
            const int64_t k = start + lane;
            const float first = std::fabs(w0[k]), second = std::fabs(w1[k]);
            const Choice choice = rule(first, second, row0 * column0[k], row1 * column1[k]);
            const uint32_t exact = bits_of(choice.magnitude);
            const int32_t rounded = int32_t((exact + 0x7fff + ((exact >> 16) & 1)) >> 16);
            const bool nonzero = rounded >= kHalfSmallest;
            const int32_t stored = rounded < kSmallest ? kSmallest : rounded;
            const bool has0 = choice.first & nonzero, has1 = choice.second & nonzero;
            uint32_t word = nonzero ? uint32_t(stored - kRebias) : 0u;
            word |= has0 ? (bits_of(w0[k]) >> (31 - kSignBits[0]) & 1u << kSignBits[0]) | kMask[0] : 0u;
            word |= has1 ? (bits_of(w1[k]) >> (31 - kSignBits[1]) & 1u << kSignBits[1]) | kMask[1] : 0u;
            words[k] = int16_t(word);
            const float magnitude = float_of(uint32_t(stored) << 16);
            const float lost0 = first - (has0 ? magnitude : 0.0f), lost1 = second - (has1 ? magnitude : 0.0f);
            error[lane] += lost0 * lost0 + lost1 * lost1;
            weight[lane] += first * first + second * second;
            refused += rounded > kLargest;
            shared += has0 & has1;
            kept += has0 + has1;
        }
    }
    sums.refused += refused;
    sums.shared += shared;
    sums.kept += kept;
    for (int lane = 0; lane < kLanes; ++lane) {
        sums.squared_error += error[lane];
        sums.squared_weight += weight[lane];
    }
}

template <typename Rule>
[[gnu::always_inline]] inline void pack_rows(const Rule rule, const float* weights, const float* by_row,
                                             const float* by_column, int64_t rows, int64_t columns, int16_t* words,
                                             Sums& sums) {
    const float* other = weights + rows * columns;
    for (int64_t row = 0; row < rows; ++row) {
        const float row0 = by_row ? by_row[row] : 1.0f, row1 = by_row ? by_row[rows + row] : 1.0f;
        pack_row(rule, weights + row * columns, other + row * columns, row0, row1, by_column, by_column + columns,
                 columns, words + row * columns, sums);
    }
}

}  // namespace

#define PUZZLEMOE_EXPORT extern "C" [[gnu::visibility("default"), gnu::target_clones("avx512f", "avx2", "default")]]

// `weights` (2, rows, columns), `by_row` (2, rows) or null, `by_column` (2, columns); adds to `sums`. What no word can
// hold, NaN included, is counted as refused.
PUZZLEMOE_EXPORT void puzzlemoe_pack_by_paper(float tau, const float* weights, const float* by_row,
                                              const float* by_column, int64_t rows, int64_t columns, int16_t* words,
                                              Sums* sums) {
    pack_rows(Paper{tau}, weights, by_row, by_column, rows, columns, words, *sums);
}

PUZZLEMOE_EXPORT void puzzlemoe_pack_by_cost(const float* weights, const float* by_row, const float* by_column,
                                             int64_t rows, int64_t columns, int16_t* words, Sums* sums) {
    pack_rows(Cheapest{}, weights, by_row, by_column, rows, columns, words, *sums);
}
