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
    PUZZLEMOE_AVX512_VBMI = 4,
    PUZZLEMOE_AMX_BF16 = 5,
    PUZZLEMOE_NUM_ISAS = 6,
};

enum PuzzleMoeIsaStatus : int32_t {
    PUZZLEMOE_USABLE = 0,
    PUZZLEMOE_CPU_LACKS_IT = 1,
    PUZZLEMOE_KERNEL_REFUSES_IT = 2,
};

enum PuzzleMoeDtype : int32_t { PUZZLEMOE_BFLOAT16 = 0, PUZZLEMOE_FLOAT16 = 1, PUZZLEMOE_FLOAT32 = 2 };

enum PuzzleMoeIdType : int32_t { PUZZLEMOE_INT32 = 0, PUZZLEMOE_INT64 = 1 };

enum PuzzleMoeActivation : int32_t { PUZZLEMOE_SILU = 0, PUZZLEMOE_GELU = 1, PUZZLEMOE_GELU_TANH = 2 };

// One call of packed_moe, and the part of one of coded_moe that is the same: there a slot holds one expert. Rows are
// contiguous. padded_* are multiples of 32; words are in tile order (tiles.h), codes in code order (code_order.h).
struct PuzzleMoeCall {
    const void* x;                  // (num_tokens, hidden_size), dtype
    const void* w13;                // num_slots matrices of 2 * padded_intermediate x padded_hidden words; or codes
    const void* w2;                 // num_slots matrices of padded_hidden x padded_intermediate words; or codes
    const int32_t* slot_of_expert;  // (num_experts), 2 * slot + member or -1; for codes slot or -1
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

// What codes of gate and up, or of down, need beside them. The matrices are those of CodedMatrices in kernels/coded.py.
struct PuzzleMoeCodes {
    const int64_t* index;      // (num_slots, 2): the byte at which codes begin, and the bits of a code
    const uint16_t* codebook;  // (num_slots, 512), in code order
    const uint16_t* scale;     // (num_slots, 2, rows), BF16
    int64_t num_bytes;         // of all codes
};

struct PuzzleMoeCodedCall {
    PuzzleMoeCall call;
    PuzzleMoeCodes w13;  // rows: padded_intermediate
    PuzzleMoeCodes w2;   // rows: padded_hidden / 2
};

// Whether this CPU and this kernel let the process use an ISA level. Asks for AMX tile permission once.
PUZZLEMOE_EXPORT PuzzleMoeIsaStatus puzzlemoe_isa_status(PuzzleMoeIsa isa);

// The bytes of workspace that a call of these sizes needs; pointers are not looked at.
PUZZLEMOE_EXPORT int64_t puzzlemoe_workspace_bytes(const PuzzleMoeCall* call);

// What puzzlemoe_packed_moe and puzzlemoe_coded_moe return beside 0 and a number of bytes; nothing is then written to the output.
enum PuzzleMoeRefusal : int64_t {
    PUZZLEMOE_UNKNOWN_EXPERT = -1,   // an id of num_experts or more
    PUZZLEMOE_UNKNOWN_SLOT = -2,     // slot_of_expert sends a chosen expert to slot num_slots or beyond
    PUZZLEMOE_MISSING_ADDRESS = -3,  // null where there is something to read or write
    PUZZLEMOE_TOO_MANY_ROWS = -4,    // num_tokens * top_k or num_slots is more than 32 bits count
    PUZZLEMOE_UNKNOWN_CODES = -5,    // an index sends a chosen expert outside of the codes, or to a width there is not
};

// Computes call->output. Returns 0, or a PuzzleMoeRefusal, or the bytes of workspace that are needed where there are
// fewer (nothing is then written).
PUZZLEMOE_EXPORT int64_t puzzlemoe_packed_moe(const PuzzleMoeCall* call);
PUZZLEMOE_EXPORT int64_t puzzlemoe_coded_moe(const PuzzleMoeCodedCall* call);

// Puts one row-major matrix of rows x columns words into tile order, in place. `scratch` holds as many words. The first
// tile of block b has rows b * first_step and on, the second rows second_begin + b * first_step and on: 16 and rows / 2
// for w13 (gate meets up), 32 and 16 for w2.
PUZZLEMOE_EXPORT void puzzlemoe_tile_slot(uint16_t* words, uint16_t* scratch, int64_t rows, int64_t columns,
                                          int64_t first_step, int64_t second_begin);

// Puts one expert's bit stream of rows x columns codes into a level's code order, in place; rows are a multiple of 16,
// columns of 32. `scratch` holds as many bytes, rows * columns / 8 * bits.
PUZZLEMOE_EXPORT void puzzlemoe_order_codes(uint8_t* codes, uint8_t* scratch, int64_t rows, int64_t columns,
                                            int32_t bits, PuzzleMoeIsa isa);

// Puts one codebook of 256 points, two BF16 coordinates each, into a level's code order, in place.
PUZZLEMOE_EXPORT void puzzlemoe_order_codebook(uint16_t* codebook, int32_t bits, PuzzleMoeIsa isa);
