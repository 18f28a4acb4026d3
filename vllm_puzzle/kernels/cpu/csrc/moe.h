// One call of the operator, over the kernels of one ISA level.
//
// Every translation unit that includes this is compiled for another instruction set, so all of it has internal linkage:
// an inline function that the linker were free to merge could end up with instructions that this CPU lacks.
//
// `Experts` (pairs.h, codes.h) knows how experts are stored, and multiplies a block of them by the kernels of `Isa`:
//   kMembers                the experts of a slot
//   check(slots, n)         0, or a PuzzleMoeRefusal for slots that cannot be computed
//   gate_up_block(slot, block), down_block(slot, block, next_slot, next_block)
//                           where a block of 32 output rows is, and the one that is likely to be read after it
//   multiply(block, group, columns, a, stride, room, done)
//                           a group's rows `a` times the block; done(first, rows, c) gets the products chunk by chunk,
//                           `first` counted from the group's first row, c (rows, 32) float32
//   finish_gate_up(block, c, rows), finish_down(block, c, rows)
//                           make of c the sums of 16 gate rows and 16 up rows, or of 32 neighbouring outputs
//
// `Isa` provides
//   Act                     what an activation is kept in: uint16_t (BF16) or float
//   kChunk                  rows of activations that `dense` takes at the most
//   begin(), end()          called by every thread around its work
//   dense(decoded, steps, a, n, stride, c, ahead)
//                           c = a @ decoded.T; asks for what is at `ahead` meanwhile
// and what pairs.h and codes.h ask of it. `decoded` is a block in tile order.
#pragma once

#include <omp.h>

#include "abi.h"
#include "scalar.h"
#include "tiles.h"
#include "workspace.h"

namespace {

using namespace puzzlemoe;

constexpr int kMostChunk = 32;

// A thread's room for a decoded block of each member of a slot.
struct Room {
    uint16_t* decoded[2];
};

constexpr int kCacheLine = 64;

// What is to be read after this block: so many cache lines for every K-step, none where `place` is null.
struct Ahead {
    const char* place;
    int step_lines;
};

// Multiplies `count` rows by a decoded block, and gives done(first, rows, c) chunks of them.
template <class Isa, class Done>
void multiply_decoded(const uint16_t* decoded, int steps, const typename Isa::Act* a, int64_t count, int64_t stride,
                      Ahead ahead, const Done& done) {
    alignas(64) float c[kMostChunk * kBlockRows];
    // Chunks of even length: a last one of a single row would leave most of the multipliers idle.
    const int64_t chunks = (count + Isa::kChunk - 1) / Isa::kChunk;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t begin = count * chunk / chunks, end = count * (chunk + 1) / chunks;
        // The first chunk fetches the next block while it multiplies, or memory would rest until the last one is done.
        Isa::dense(decoded, steps, a + begin * stride, int(end - begin), stride, c, chunk ? Ahead{} : ahead);
        done(begin, end - begin, c);
    }
}

template <class Isa, class Experts>
struct Moe {
    using Act = typename Isa::Act;

    const PuzzleMoeCall& call;
    const Experts experts;
    const Workspace space;
    int64_t num_groups = 0;

    Moe(const PuzzleMoeCall& moe_call, const Experts& its_experts)
        : call(moe_call), experts(its_experts), space(lay_out(moe_call, sizeof(Act))) {}

    int64_t run() {
        if (const int64_t refusal = check(call)) return refusal;
        if (space.total_bytes > call.workspace_bytes) return space.total_bytes;
        num_groups = group_by_slot(call, space, Experts::kMembers);
        if (num_groups < 0) return num_groups;
        if (const int64_t refusal = experts.check(space.groups, num_groups)) return refusal;
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

    void gate_up(const Group& group, int64_t block) const {
        const auto stored = experts.gate_up_block(group.slot, block);
        experts.multiply(stored, group, call.padded_hidden, x_row(group.begin), space.x_stride, room(),
                         [&](int64_t first, int64_t count, float* c) {
                             experts.finish_gate_up(stored, c, count);
                             for (int64_t i = 0; i < count; ++i) {
                                 const int64_t row = group.begin + first + i;
                                 const float scale = call.weight_on_input ? space.row_weight[row] : 1.0f;
                                 activate_and_multiply(c + i * kBlockRows, scale, inner_row(row) + block * kTileRows);
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
        float* sums = thread_sums();
        for (int64_t i = 0; i < call.num_tokens * kBlockRows; ++i) sums[i] = 0.0f;
        for (int64_t g = 0; g < num_groups; ++g) {
            const Group& group = space.groups[g];
            const bool last = g + 1 == num_groups;
            const int64_t next_block = last && block + 1 < call.padded_hidden / kBlockRows ? block + 1 : block;
            const auto stored = experts.down_block(group.slot, block, space.groups[last ? 0 : g + 1].slot, next_block);
            experts.multiply(stored, group, call.padded_intermediate, inner_row(group.begin), space.inner_stride,
                             room(), [&](int64_t first, int64_t count, float* c) {
                                 experts.finish_down(stored, c, count);
                                 for (int64_t i = 0; i < count; ++i) {
                                     const int64_t row = group.begin + first + i;
                                     float* sum = sums + int64_t(space.row_token[row]) * kBlockRows;
                                     const float scale = call.weight_on_input ? 1.0f : space.row_weight[row];
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

    // This thread's part of the workspace: the room, and behind it the sums.
    char* own_part() const { return space.per_thread + omp_get_thread_num() * space.thread_bytes; }
    Room room() const {
        uint16_t* words = reinterpret_cast<uint16_t*>(own_part());
        return {{words, words + space.decoded_words}};
    }
    float* thread_sums() const {
        return reinterpret_cast<float*>(own_part() + 2 * space.decoded_words * int64_t(sizeof(uint16_t)));
    }
};

}  // namespace
