// The C ABI of the CPU engine, whose enums and call library.py mirrors. No torch, no Python, no C++ types.
#pragma once

#include <cstddef>
#include <cstdint>

#define PUZZLEMOE_EXPORT extern "C" __attribute__((visibility("default")))

// From the least to the most capable; the order in which "auto" prefers them, last first.
enum PuzzleMoeIsa : int32_t {
    PUZZLEMOE_PORTABLE = 0,
    PUZZLEMOE_AVX2 = 1,
    PUZZLEMOE_AVX512 = 2,
    PUZZLEMOE_AVX512_BF16 = 3,
    PUZZLEMOE_AMX_BF16 = 4,
    PUZZLEMOE_NUM_ISAS = 5,
};

enum PuzzleMoeIsaStatus : int32_t {
    PUZZLEMOE_USABLE = 0,
    PUZZLEMOE_CPU_LACKS_IT = 1,
    PUZZLEMOE_KERNEL_REFUSES_IT = 2,
};

enum PuzzleMoeDtype : int32_t { PUZZLEMOE_BFLOAT16 = 0, PUZZLEMOE_FLOAT16 = 1, PUZZLEMOE_FLOAT32 = 2 };

enum PuzzleMoeIdType : int32_t { PUZZLEMOE_INT32 = 0, PUZZLEMOE_INT64 = 1 };

enum PuzzleMoeActivation : int32_t { PUZZLEMOE_SILU = 0, PUZZLEMOE_GELU = 1, PUZZLEMOE_GELU_TANH = 2 };

// One call of the operator. Rows are contiguous. padded_* are multiples of 32; w13 and w2 are in tile order (tiles.h).
struct PuzzleMoeCall {
    const void* x;                  // (num_tokens, hidden_size), dtype
    const uint16_t* w13;            // num_slots matrices of 2 * padded_intermediate x padded_hidden words
    const uint16_t* w2;             // num_slots matrices of padded_hidden x padded_intermediate words
    const int32_t* slot_of_expert;  // (num_experts), 2 * slot + member or -1
    const float* topk_weights;      // (num_tokens, top_k)
    const void* topk_ids;           // (num_tokens, top_k), id_type
    void* output;                   // (num_tokens, hidden_size), dtype
    void* workspace;                // aligned to 64 bytes
    int64_t workspace_bytes;
    int64_t num_tokens;
    int64_t hidden_size;
    int64_t padded_hidden;
    int64_t padded_intermediate;
    int64_t num_slots;
    int64_t num_experts;
    int64_t top_k;
    PuzzleMoeIdType id_type;
    PuzzleMoeDtype dtype;
    PuzzleMoeActivation activation;
    int32_t weight_on_input;  // 0: router weights scale what an expert puts out; otherwise, what is put in
    PuzzleMoeIsa isa;
    int32_t num_threads;  // set by the functions below: what the OpenMP pool gives to the calling thread
};

// Whether this CPU and this kernel let the process use an ISA level. Asks for AMX tile permission once.
PUZZLEMOE_EXPORT PuzzleMoeIsaStatus puzzlemoe_isa_status(PuzzleMoeIsa isa);

// The bytes of workspace that a call of these sizes needs; pointers are not looked at.
PUZZLEMOE_EXPORT int64_t puzzlemoe_workspace_bytes(const PuzzleMoeCall* call);

// What puzzlemoe_packed_moe returns beside 0 and a number of bytes; nothing is then written to the output.
enum PuzzleMoeRefusal : int64_t {
    PUZZLEMOE_UNKNOWN_EXPERT = -1,   // an id of num_experts or more
    PUZZLEMOE_UNKNOWN_SLOT = -2,     // slot_of_expert sends a chosen expert to slot num_slots or beyond
    PUZZLEMOE_MISSING_ADDRESS = -3,  // null where there is something to read or write
    PUZZLEMOE_TOO_MANY_ROWS = -4,    // num_tokens * top_k or num_slots is more than 32 bits count
};

// Computes call->output. Returns 0, or a PuzzleMoeRefusal, or the bytes of workspace that are needed where there are
// fewer (nothing is then written).
PUZZLEMOE_EXPORT int64_t puzzlemoe_packed_moe(const PuzzleMoeCall* call);

// Puts one row-major matrix of rows x columns words into tile order, in place. `scratch` holds as many words. The first
// tile of block b has rows b * first_step and on, the second rows second_begin + b * first_step and on: 16 and rows / 2
// for w13 (gate meets up), 32 and 16 for w2.
PUZZLEMOE_EXPORT void puzzlemoe_tile_slot(uint16_t* words, uint16_t* scratch, int64_t rows, int64_t columns,
                                          int64_t first_step, int64_t second_begin);
