// One call of the operator, over the kernels of one ISA level.
//
// Every translation unit that includes this is compiled for another instruction set, so all of it has internal linkage:
// an inline function that the linker were free to merge could end up with instructions that this CPU lacks.
//
// `Isa` provides
//   Act                     what an activation is kept in: uint16_t (BF16) or float
//   kChunk                  rows of activations that `dense` takes at the most
//   begin(), end()          called by every thread around its work
//   kDecodesInRegisters     whether it has the next two
//   takes_packed(n0, n1)    whether `packed` takes these numbers of rows
//   packed(words, stream, next, steps, a, n0, n1, stride, c, scratch)
//                           c = a @ decoded.T for n0 rows with member 0 and the n1 rows behind them with member 1; asks
//                           for the words a little ahead of this place in `stream`, then in `next`
//   decode(words, next, steps, d0, d1)   decodes a block for the members whose destination is not null
//   dense(decoded, steps, a, n, stride, c, ahead)
//                           c = a @ decoded.T; asks for as many words at `ahead` as were decoded, unless it is null
// `words` is a block in tile order, `next` the block that is likely to be read after it, c is (rows, 32) float32.
#pragma once

#include <omp.h>

#include "abi.h"
#include "scalar.h"
#include "tiles.h"
#include "workspace.h"

namespace {

using namespace puzzlemoe;

constexpr int kMostChunk = 32;

template <class Isa>
struct Moe {
    using Act = typename Isa::Act;

    const PuzzleMoeCall& call;
    const Workspace space;
    int64_t num_groups = 0;

    explicit Moe(const PuzzleMoeCall& moe_call) : call(moe_call), space(lay_out(moe_call, sizeof(Act))) {}

    int64_t run() {
        if (const int64_t refusal = check(call)) return refusal;
        if (space.total_bytes > call.workspace_bytes) return space.total_bytes;
        num_groups = group_by_slot(call, space);
        if (num_groups < 0) return num_groups;
        const Group* last = num_groups ? &space.groups[num_groups - 1] : nullptr;
        const int64_t num_rows = last ? last->begin + last->count[0] + last->count[1] : 0;
        const int64_t gate_blocks = call.padded_intermediate / kTileRows;
        const int64_t gate_items = num_groups * gate_blocks;
        const int64_t down_blocks = call.padded_hidden / kBlockRows;
        // A thread that takes neighbouring blocks reads one stream; too long a run and the threads end far apart.
        const int64_t gate_run = 1 + gate_items / (call.num_threads * 32);
        const int64_t down_run = 1 + down_blocks / (call.num_threads * 16);
#pragma omp parallel num_threads(call.num_threads)
        {
            Isa::begin();
#pragma omp for schedule(static)
            for (int64_t row = 0; row < num_rows; ++row) gather(row);
#pragma omp for schedule(dynamic, gate_run)
            for (int64_t item = 0; item < gate_items; ++item)
                gate_up(space.groups[item / gate_blocks], item % gate_blocks);
#pragma omp for schedule(dynamic, down_run)
            for (int64_t block = 0; block < down_blocks; ++block) down(block);
            Isa::end();
        }
        return 0;
    }

   private:
    Act* x_row(int64_t row) const { return reinterpret_cast<Act*>(space.x) + row * space.x_stride; }
    Act* inner_row(int64_t row) const { return reinterpret_cast<Act*>(space.inner) + row * space.inner_stride; }

    static Act keep(float value) {
        if constexpr (sizeof(Act) == 2) {
            return to_bf16(value);
        } else {
            return value;
        }
    }

    void gather(int64_t row) const {
        Act* to = x_row(row);
        const int64_t hidden = call.hidden_size;
        const int64_t from = int64_t(space.row_token[row]) * hidden;
        if (call.dtype == PUZZLEMOE_FLOAT32) {
            const float* x = static_cast<const float*>(call.x) + from;
            for (int64_t i = 0; i < hidden; ++i) to[i] = keep(x[i]);
        } else {
            const uint16_t* x = static_cast<const uint16_t*>(call.x) + from;
            if constexpr (sizeof(Act) == 2) {
                std::memcpy(to, x, hidden * sizeof(Act));
            } else if (call.dtype == PUZZLEMOE_BFLOAT16) {
                for (int64_t i = 0; i < hidden; ++i) to[i] = from_bf16(x[i]);
            } else {
                for (int64_t i = 0; i < hidden; ++i) to[i] = from_fp16(x[i]);
            }
        }
        for (int64_t i = hidden; i < call.padded_hidden; ++i) to[i] = Act(0);
    }

    // Multiplies a group's activations by one block; `done(first row, rows, c)` gets the products, chunk by chunk.
    template <class Done>
    void multiply(const Group& group, const uint16_t* words, const uint16_t* next, int64_t columns, const Act* rows,
                  int64_t stride, const Done& done) const {
        alignas(64) float c[kMostChunk * kBlockRows];
        const int steps = int(columns / kStepColumns);
        const Act* a = rows + group.begin * stride;
        uint16_t* decoded[2] = {decoded_block(0), decoded_block(1)};
        const int32_t n0 = group.count[0], n1 = group.count[1];
        if constexpr (Isa::kDecodesInRegisters) {
            if (Isa::takes_packed(n0, n1)) {
                Isa::packed(words, words, next, steps, a, n0, n1, stride, c, decoded[0]);
                done(group.begin, n0 + n1, c);
                return;
            }
            if (Isa::takes_packed(n0, 0) && Isa::takes_packed(0, n1)) {
                // One member after the other: the second finds the words in the cache, and fetches the next block.
                Isa::packed(words, words, next, steps, a, n0, 0, stride, c, decoded[0]);
                done(group.begin, n0, c);
                Isa::packed(words, next, next, steps, a + n0 * stride, 0, n1, stride, c, decoded[0]);
                done(group.begin + n0, n1, c);
                return;
            }
        }
        Isa::decode(words, next, steps, n0 ? decoded[0] : nullptr, n1 ? decoded[1] : nullptr);
        // The first chunk fetches the next block while it multiplies, or memory would rest until the last one is done.
        const uint16_t* ahead = next;
        int64_t first = group.begin;
        for (int member = 0; member < 2; ++member) {
            // Chunks of even length: a last one of a single row would leave most of the multipliers idle.
            const int64_t count = group.count[member];
            const int64_t chunks = (count + Isa::kChunk - 1) / Isa::kChunk;
            for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                const int64_t begin = count * chunk / chunks, end = count * (chunk + 1) / chunks;
                Isa::dense(decoded[member], steps, rows + (first + begin) * stride, int(end - begin), stride, c, ahead);
                ahead = nullptr;
                done(first + begin, end - begin, c);
            }
            first += count;
        }
    }

    void gate_up(const Group& group, int64_t block) const {
        const int64_t block_words = call.padded_hidden * kBlockRows;
        const int64_t slot_words = 2 * call.padded_intermediate * call.padded_hidden;
        const uint16_t* words = call.w13 + group.slot * slot_words + block * block_words;
        const bool last = (block + 1) * kTileRows == call.padded_intermediate;
        multiply(group, words, last ? words : words + block_words, call.padded_hidden, x_row(0), space.x_stride,
                 [&](int64_t first, int64_t count, const float* c) {
                     for (int64_t i = 0; i < count; ++i) {
                         const float scale = call.weight_on_input ? space.row_weight[first + i] : 1.0f;
                         activate_and_multiply(c + i * kBlockRows, scale, inner_row(first + i) + block * kTileRows);
                     }
                 });
    }

    // A row of one block's products, gate beside up, becomes 16 inner activations.
    void activate_and_multiply(const float* c, float scale, Act* to) const {
        switch (call.activation) {
            case PUZZLEMOE_SILU: return activate_and_multiply_by<PUZZLEMOE_SILU>(c, scale, to);
            case PUZZLEMOE_GELU: return activate_and_multiply_by<PUZZLEMOE_GELU>(c, scale, to);
            default: return activate_and_multiply_by<PUZZLEMOE_GELU_TANH>(c, scale, to);
        }
    }

    template <PuzzleMoeActivation activation>
    static void activate_and_multiply_by(const float* c, float scale, Act* to) {
        for (int i = 0; i < kTileRows; ++i)
            to[i] = keep(activate<activation>(c[i] * scale) * (c[i + kTileRows] * scale));
    }

    // One thread owns 32 columns of the output and adds the slots up in their order: no atomics, one result.
    void down(int64_t block) const {
        const int64_t block_words = call.padded_intermediate * kBlockRows;
        const int64_t slot_words = call.padded_hidden * call.padded_intermediate;
        float* sums = thread_sums();
        for (int64_t i = 0; i < call.num_tokens * kBlockRows; ++i) sums[i] = 0.0f;
        for (int64_t g = 0; g < num_groups; ++g) {
            const Group& group = space.groups[g];
            const bool last = g + 1 == num_groups;
            const int64_t next_block = last && block + 1 < call.padded_hidden / kBlockRows ? block + 1 : block;
            const uint16_t* words = call.w2 + group.slot * slot_words + block * block_words;
            const Group& after = space.groups[last ? 0 : g + 1];
            const uint16_t* next = call.w2 + after.slot * slot_words + next_block * block_words;
            multiply(group, words, next, call.padded_intermediate, inner_row(0), space.inner_stride,
                     [&](int64_t first, int64_t count, const float* c) {
                         for (int64_t i = 0; i < count; ++i) {
                             float* sum = sums + int64_t(space.row_token[first + i]) * kBlockRows;
                             const float scale = call.weight_on_input ? 1.0f : space.row_weight[first + i];
                             for (int n = 0; n < kBlockRows; ++n) sum[n] += scale * c[i * kBlockRows + n];
                         }
                     });
        }
        write(block, sums);
    }

    void write(int64_t block, const float* sums) const {
        const int64_t left = call.hidden_size - block * kBlockRows;
        const int64_t columns = left < kBlockRows ? left : kBlockRows;
        for (int64_t token = 0; token < call.num_tokens; ++token) {
            const int64_t place = token * call.hidden_size + block * kBlockRows;
            const float* sum = sums + token * kBlockRows;
            uint16_t* halves = static_cast<uint16_t*>(call.output) + place;
            if (call.dtype == PUZZLEMOE_BFLOAT16) {
                for (int64_t n = 0; n < columns; ++n) halves[n] = to_bf16(sum[n]);
            } else if (call.dtype == PUZZLEMOE_FLOAT16) {
                for (int64_t n = 0; n < columns; ++n) halves[n] = to_fp16(sum[n]);
            } else {
                std::memcpy(static_cast<float*>(call.output) + place, sum, columns * sizeof(float));
            }
        }
    }

    // This thread's room: a decoded block of each member, and behind them the sums.
    uint16_t* decoded_block(int member) const {
        char* mine = space.per_thread + omp_get_thread_num() * space.thread_bytes;
        return reinterpret_cast<uint16_t*>(mine) + member * space.decoded_words;
    }
    float* thread_sums() const { return reinterpret_cast<float*>(decoded_block(0) + 2 * space.decoded_words); }
};

}  // namespace
