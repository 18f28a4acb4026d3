// Coded experts: a slot is one expert, its codes of one width for each matrix.
//
// `Isa` provides beside what moe.h says
//   takes_coded(n)          whether `coded` takes so many rows
//   coded<bits>(block, steps, a, n, stride, c, scratch)
//                           c = a @ decoded.T of what the codes' points decode to, without scales
//   decode_codes<bits>(block, steps, decoded)
//                           decodes a block into tile order
#pragma once

#include <type_traits>

#include "code_order.h"
#include "moe.h"

namespace {

// A block of codes in code order.
struct CodeBlock {
    const uint8_t* codes;
    const uint8_t* next;  // the block that is likely to be read after it
    const uint16_t* codebook;
    const uint16_t* scale;  // BF16, of the first weights of the block's rows
    int64_t scale_stride;   // from there to those of the second weights
    int bits;
};

// How far ahead codes are asked for: about what memory delivers in its own latency.
constexpr int kBytesAhead = 2048;

// Asks for the codes that will be read a little later than K-step `step`.
template <int bits>
inline void prefetch_codes(const CodeBlock& block, int step, int steps) {
    constexpr int kStepsAhead = kBytesAhead / int(step_code_bytes(bits));
    const int ahead = step + kStepsAhead;
    const uint8_t* place = ahead < steps ? block.codes + ahead * step_code_bytes(bits)
                                         : block.next + (ahead - steps) * step_code_bytes(bits);
    for (int i = 0; i < step_code_bytes(bits); i += kCacheLine) __builtin_prefetch(place + i);
}

template <class Isa>
struct Codes {
    using Act = typename Isa::Act;
    static constexpr int kMembers = 1;

    const PuzzleMoeCodedCall& coded;

    int64_t check(const Group* groups, int64_t num_groups) const {
        const PuzzleMoeCall& call = coded.call;
        const bool missing = call.num_slots > 0 && (!coded.w13.index || !coded.w13.codebook || !coded.w13.scale ||
                                                    !coded.w2.index || !coded.w2.codebook || !coded.w2.scale);
        if (missing) return PUZZLEMOE_MISSING_ADDRESS;
        for (int64_t g = 0; g < num_groups; ++g) {
            const int64_t slot = groups[g].slot;
            if (!is_inside(coded.w13, slot, call.padded_intermediate, call.padded_hidden) ||
                !is_inside(coded.w2, slot, call.padded_hidden / 2, call.padded_intermediate))
                return PUZZLEMOE_UNKNOWN_CODES;
        }
        return 0;
    }

    CodeBlock gate_up_block(int64_t slot, int64_t block) const {
        const PuzzleMoeCall& call = coded.call;
        const int64_t rows = call.padded_intermediate;
        const int64_t next = (block + 1) * kTileRows == rows ? block : block + 1;
        return find(coded.w13, call.w13, rows, call.padded_hidden, slot, block, slot, next);
    }

    CodeBlock down_block(int64_t slot, int64_t block, int64_t next_slot, int64_t next_block) const {
        const PuzzleMoeCall& call = coded.call;
        return find(coded.w2, call.w2, call.padded_hidden / 2, call.padded_intermediate, slot, block, next_slot,
                    next_block);
    }

    template <class Done>
    void multiply(const CodeBlock& block, const Group& group, int64_t columns, const Act* a, int64_t stride,
                  const Room& room, const Done& done) const {
        switch (block.bits) {
            case 4: return multiply_of<4>(block, group.count[0], columns, a, stride, room, done);
            case 5: return multiply_of<5>(block, group.count[0], columns, a, stride, room, done);
            case 6: return multiply_of<6>(block, group.count[0], columns, a, stride, room, done);
            default: return multiply_of<8>(block, group.count[0], columns, a, stride, room, done);
        }
    }

    void finish_gate_up(const CodeBlock& block, float* c, int64_t rows) const {
        float scale[kBlockRows];
        scales_of(block, scale);
        for (int64_t row = 0; row < rows; ++row, c += kBlockRows)
            for (int n = 0; n < kBlockRows; ++n) c[n] *= scale[n];
    }

    // Even outputs lie before odd ones.
    void finish_down(const CodeBlock& block, float* c, int64_t rows) const {
        float scale[kBlockRows], scaled[kBlockRows];
        scales_of(block, scale);
        for (int64_t row = 0; row < rows; ++row, c += kBlockRows) {
            for (int n = 0; n < kBlockRows; ++n) scaled[n] = c[n] * scale[n];
            for (int n = 0; n < kTileRows; ++n) {
                c[2 * n] = scaled[n];
                c[2 * n + 1] = scaled[n + kTileRows];
            }
        }
    }

   private:
    static bool is_inside(const PuzzleMoeCodes& matrix, int64_t slot, int64_t rows, int64_t columns) {
        const int64_t begin = matrix.index[2 * slot], bits = matrix.index[2 * slot + 1];
        if (bits != 4 && bits != 5 && bits != 6 && bits != 8) return false;
        return begin >= 0 && begin <= matrix.num_bytes && rows * columns / 8 * bits <= matrix.num_bytes - begin;
    }

    static CodeBlock find(const PuzzleMoeCodes& matrix, const void* codes, int64_t rows, int64_t columns, int64_t slot,
                          int64_t block, int64_t next_slot, int64_t next_block) {
        const uint8_t* all = static_cast<const uint8_t*>(codes);
        const int64_t* at = matrix.index + 2 * slot;
        const int64_t* then = matrix.index + 2 * next_slot;
        const int64_t bytes = kTileRows * columns / 8;
        return {all + at[0] + block * bytes * at[1],
                all + then[0] + next_block * bytes * then[1],
                matrix.codebook + slot * 2 * kPoints,
                matrix.scale + 2 * slot * rows + block * kTileRows,
                rows,
                int(at[1])};
    }

    static void scales_of(const CodeBlock& block, float (&scale)[kBlockRows]) {
        for (int n = 0; n < kTileRows; ++n) {
            scale[n] = from_bf16(block.scale[n]);
            scale[n + kTileRows] = from_bf16(block.scale[n + block.scale_stride]);
        }
    }

    template <int bits, class Done>
    static void multiply_of(const CodeBlock& block, int32_t count, int64_t columns, const Act* a, int64_t stride,
                            const Room& room, const Done& done) {
        const int steps = int(columns / kStepColumns);
        if (Isa::takes_coded(count)) {
            alignas(64) float c[kMostChunk * kBlockRows];
            Isa::template coded<bits>(block, steps, a, count, stride, c, room.decoded[0]);
            done(0, count, c);
            return;
        }
        Isa::template decode_codes<bits>(block, steps, room.decoded[0]);
        const Ahead ahead{reinterpret_cast<const char*>(block.next), int(step_code_bytes(bits)) / kCacheLine};
        multiply_decoded<Isa>(room.decoded[0], steps, a, count, stride, ahead, done);
    }
};

}  // namespace
