// Where the intermediate results of a call lie in its workspace. Nothing here is inline: the levels' translation units
// include it, and the linker could keep the copy of one whose instructions another's CPU lacks.
#pragma once

#include "abi.h"
#include "tiles.h"

namespace puzzlemoe {

// The choices of one slot: its rows in the gathered order, member 0 first.
struct Group {
    int32_t slot;
    int32_t begin;
    int32_t count[2];
};

// Rows that kernels may read, never use, past the last one: AMX loads 16 at a time and takes two loads a turn.
constexpr int64_t kSpareRows = 32;
// One cache line between rows, so that rows of 4 KB do not all compete for one set of the L1 cache.
constexpr int64_t kRowGapBytes = 64;

// Columns that a thread's decoded block has room for even where the matrices are narrower: AMX's ring of K-steps.
constexpr int64_t kLeastColumns = 4 * kStepColumns;

struct Workspace {
    int64_t num_rows;      // token-choice pairs at the most
    int64_t x_stride;      // elements between gathered activations
    int64_t inner_stride;  // elements between inner activations
    int32_t* row_begin;    // (2 * num_slots + 1) first row of each expert
    Group* groups;         // (num_slots)
    int32_t* row_token;    // (num_rows)
    float* row_weight;     // (num_rows)
    char* x;               // (num_rows + kSpareRows) x x_stride activations, gathered
    char* inner;           // (num_rows + kSpareRows) x inner_stride
    char* per_thread;      // num_threads x thread_bytes
    int64_t thread_bytes;
    int64_t decoded_words;  // of one member's block, at the start of a thread's part; the sums follow
    int64_t total_bytes;
};

// `activation_bytes` is what the kernels of this ISA level keep an activation in: 2 (BF16) or 4 (float32).
Workspace lay_out(const PuzzleMoeCall& call, int64_t activation_bytes);

// Whether every address that the call reads or writes is there, and its rows can be counted: 0 or a PuzzleMoeRefusal.
int64_t check(const PuzzleMoeCall& call);

// Sorts the token-choice pairs by slot and member, of which a slot has one or two. Returns the number of slots that have
// any, or a PuzzleMoeRefusal for an id or a slot out of range. Ids of -1 and experts that are not here are left out.
int64_t group_by_slot(const PuzzleMoeCall& call, const Workspace& space, int members);

}  // namespace puzzlemoe
