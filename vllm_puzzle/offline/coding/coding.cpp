// Choosing the codes of a block of columns, row by row.
//
// The choices are those of columns.py, operation by operation in float32, so that codes come out bit for bit as torch
// makes them. Rows do not depend on each other, so threads share them.

#include <cstdint>
#include <limits>

namespace {

constexpr int kLanes = 8;

typedef float Floats __attribute__((vector_size(4 * kLanes)));
// As it lies in a tensor.
typedef float Stored __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

// As in compiled.py. `weights` and `errors` are of two halves, one after the other.
struct Block {
    const float *values, *slopes, *offsets;  // (2, rows, points) twice, (rows, points)
    const float *corner;                     // (columns, columns) of the block, a row every `corner_stride`
    float *weights;                          // (2, rows, columns) of the block, a row every `stride`
    uint8_t *codes;                          // (rows, columns) of the block, a row every `stride`
    float *errors;                           // (2, rows, columns)
    int64_t corner_stride, stride, rows, columns, points;
    int32_t threads;
};

struct Table {
    const float *values0, *values1, *slopes0, *slopes1, *offsets;
    int64_t points;

    Table(const Block &block, int64_t row)
        : values0(block.values + row * block.points),
          values1(values0 + block.rows * block.points),
          slopes0(block.slopes + row * block.points),
          slopes1(slopes0 + block.rows * block.points),
          offsets(block.offsets + row * block.points),
          points(block.points) {}
};

// The first of the codes with the least score.
[[gnu::always_inline]] inline int32_t nearest(const Table &table, float first, float second) {
    const auto *offsets = reinterpret_cast<const Stored *>(table.offsets);
    const auto *slopes0 = reinterpret_cast<const Stored *>(table.slopes0);
    const auto *slopes1 = reinterpret_cast<const Stored *>(table.slopes1);
    Floats least = Floats{} + std::numeric_limits<float>::infinity();
    Ints code = {}, current = {0, 1, 2, 3, 4, 5, 6, 7};
    for (int64_t p = 0; p < table.points / kLanes; ++p) {
        const Floats score = offsets[p] - slopes0[p] * first - slopes1[p] * second;
        const Ints better = score < least;
        least = better ? score : least;
        code = better ? current : code;
        current += kLanes;
    }
    for (int half = kLanes / 2; half; half /= 2) {
        const Ints lanes = Ints{0, 1, 2, 3, 4, 5, 6, 7} ^ half;
        const Floats other = __builtin_shuffle(least, lanes);
        const Ints other_code = __builtin_shuffle(code, lanes);
        const Ints better = (other < least) | ((other == least) & (other_code < code));
        least = better ? other : least;
        code = better ? other_code : code;
    }
    return code[0];
}

struct Pair {
    float *first, *second;

    Pair(float *base, int64_t row, int64_t rows, int64_t stride)
        : first(base + row * stride), second(base + (rows + row) * stride) {}
};

#define PUZZLEMOE_CLONES [[gnu::target_clones("avx512f", "avx2", "default")]]

PUZZLEMOE_CLONES void nearest_row(const Block &block, int64_t row) {
    const Table table(block, row);
    const Pair weights(block.weights, row, block.rows, block.stride);
    uint8_t *codes = block.codes + row * block.stride;
    for (int64_t k = 0; k < block.columns; ++k) codes[k] = uint8_t(nearest(table, weights.first[k], weights.second[k]));
}

PUZZLEMOE_CLONES void compensate_row(const Block &block, int64_t row) {
    const Table table(block, row);
    const Pair weights(block.weights, row, block.rows, block.stride);
    const Pair errors(block.errors, row, block.rows, block.columns);
    uint8_t *codes = block.codes + row * block.stride;
    float *__restrict first = weights.first, *__restrict second = weights.second;
    for (int64_t k = 0; k < block.columns; ++k) {
        const int32_t code = nearest(table, first[k], second[k]);
        const float *__restrict corner = block.corner + k * block.corner_stride;
        const float error0 = (first[k] - table.values0[code]) / corner[k];
        const float error1 = (second[k] - table.values1[code]) / corner[k];
        codes[k] = uint8_t(code);
        errors.first[k] = error0;
        errors.second[k] = error1;
        for (int64_t j = k + 1; j < block.columns; ++j) {
            first[j] -= corner[j] * error0;
            second[j] -= corner[j] * error1;
        }
    }
}

PUZZLEMOE_CLONES void descend_row(const Block &block, int64_t row) {
    const Table table(block, row);
    const Pair pull(block.weights, row, block.rows, block.stride);
    const Pair moved(block.errors, row, block.rows, block.columns);
    uint8_t *codes = block.codes + row * block.stride;
    float *__restrict first = pull.first, *__restrict second = pull.second;
    for (int64_t k = 0; k < block.columns; ++k) {
        const float *__restrict corner = block.corner + k * block.corner_stride;
        const float old0 = table.values0[codes[k]], old1 = table.values1[codes[k]];
        const int32_t code = nearest(table, old0 + first[k] / corner[k], old1 + second[k] / corner[k]);
        const float moved0 = old0 - table.values0[code], moved1 = old1 - table.values1[code];
        moved.first[k] = moved0;
        moved.second[k] = moved1;
        if (code == codes[k]) continue;
        codes[k] = uint8_t(code);
        for (int64_t j = k + 1; j < block.columns; ++j) {
            first[j] += corner[j] * moved0;
            second[j] += corner[j] * moved1;
        }
    }
}

template <typename Row>
void each_row(const Block &block, Row row) {
#pragma omp parallel for schedule(static) num_threads(block.threads)
    for (int64_t r = 0; r < block.rows; ++r) row(block, r);
}

}  // namespace

#define PUZZLEMOE_EXPORT extern "C" [[gnu::visibility("default")]]

// `_nearest`, `_compensate_block` and `_descend_block` of columns.py.
PUZZLEMOE_EXPORT void puzzlemoe_nearest(const Block *block) { each_row(*block, nearest_row); }
PUZZLEMOE_EXPORT void puzzlemoe_compensate(const Block *block) { each_row(*block, compensate_row); }
PUZZLEMOE_EXPORT void puzzlemoe_descend(const Block *block) { each_row(*block, descend_row); }
