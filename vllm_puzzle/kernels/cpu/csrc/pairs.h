// Experts in packed pairs: a slot's words are read once, for both members.
//
// `Isa` provides beside what moe.h says
//   kDecodesInRegisters     whether it has the next two
//   takes_packed(n0, n1)    whether `packed` takes these numbers of rows
//   packed(words, stream, next, steps, a, n0, n1, stride, c, scratch)
//                           c = a @ decoded.T for n0 rows with member 0 and the n1 rows behind them with member 1; asks
//                           for the words a little ahead of this place in `stream`, then in `next`
//   decode(words, next, steps, d0, d1)   decodes a block for the members whose destination is not null
// `words` is a block in tile order, `next` the block that is likely to be read after it.
#pragma once

#include "moe.h"

namespace {

template <class Isa>
struct Pairs {
    using Act = typename Isa::Act;
    static constexpr int kMembers = 2;

    const PuzzleMoeCall& call;

    struct Block {
        const uint16_t* words;
        const uint16_t* next;
    };

    int64_t check(const Group*, int64_t) const { return 0; }

    Block gate_up_block(int64_t slot, int64_t block) const {
        const int64_t block_words = call.padded_hidden * kBlockRows;
        const int64_t slot_words = 2 * call.padded_intermediate * call.padded_hidden;
        const uint16_t* words = static_cast<const uint16_t*>(call.w13) + slot * slot_words + block * block_words;
        const bool last = (block + 1) * kTileRows == call.padded_intermediate;
        return {words, last ? words : words + block_words};
    }

    Block down_block(int64_t slot, int64_t block, int64_t next_slot, int64_t next_block) const {
        const int64_t block_words = call.padded_intermediate * kBlockRows;
        const int64_t slot_words = call.padded_hidden * call.padded_intermediate;
        const uint16_t* all = static_cast<const uint16_t*>(call.w2);
        return {all + slot * slot_words + block * block_words, all + next_slot * slot_words + next_block * block_words};
    }

    template <class Done>
    void multiply(const Block& block, const Group& group, int64_t columns, const Act* a, int64_t stride,
                  const Room& room, const Done& done) const {
        const int steps = int(columns / kStepColumns);
        const uint16_t *words = block.words, *next = block.next;
        const int32_t n0 = group.count[0], n1 = group.count[1];
        if constexpr (Isa::kDecodesInRegisters) {
            alignas(64) float c[kMostChunk * kBlockRows];
            if (Isa::takes_packed(n0, n1)) {
                Isa::packed(words, words, next, steps, a, n0, n1, stride, c, room.decoded[0]);
                done(0, n0 + n1, c);
                return;
            }
            if (Isa::takes_packed(n0, 0) && Isa::takes_packed(0, n1)) {
                // One member after the other: the second finds the words in the cache, and fetches the next block.
                Isa::packed(words, words, next, steps, a, n0, 0, stride, c, room.decoded[0]);
                done(0, n0, c);
                Isa::packed(words, next, next, steps, a + n0 * stride, 0, n1, stride, c, room.decoded[0]);
                done(n0, n1, c);
                return;
            }
        }
        Isa::decode(words, next, steps, n0 ? room.decoded[0] : nullptr, n1 ? room.decoded[1] : nullptr);
        const Ahead ahead{reinterpret_cast<const char*>(next), kStepWords * int(sizeof(uint16_t)) / kCacheLine};
        multiply_decoded<Isa>(room.decoded[0], steps, a, n0, stride, ahead, done);
        multiply_decoded<Isa>(room.decoded[1], steps, a + n0 * stride, n1, stride, n0 ? Ahead{} : ahead,
                              [&](int64_t first, int64_t count, float* c) { done(n0 + first, count, c); });
    }

    void finish_gate_up(const Block&, float*, int64_t) const {}
    void finish_down(const Block&, float*, int64_t) const {}
};

}  // namespace
