// The exported functions: which ISA levels may be used, and the way to each.
#ifdef __clang__
#error "compile with g++: clang's OpenMP runtime would be a second pool of threads beside torch's"
#endif

#include <cpuid.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

#include "levels.h"
#include "tiles.h"
#include "workspace.h"

namespace puzzlemoe {
namespace {

bool bit(uint32_t value, int index) { return value >> index & 1u; }

// What the operating system saves of the registers (XCR0): nothing else may be used, whatever the CPU has.
uint64_t saved_state() {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return 0;
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return uint64_t(high) << 32 | low;
}

bool saves(uint64_t bits) { return (saved_state() & bits) == bits; }

bool cpu_has(PuzzleMoeIsa isa) {
    uint32_t a1 = 0, b1 = 0, c1 = 0, d1 = 0, a7 = 0, b7 = 0, c7 = 0, d7 = 0, a71 = 0, b71, c71, d71;
    __get_cpuid(1, &a1, &b1, &c1, &d1);
    __get_cpuid_count(7, 0, &a7, &b7, &c7, &d7);
    __get_cpuid_count(7, 1, &a71, &b71, &c71, &d71);
    const bool avx2 = bit(b7, 5) && bit(c1, 12) && saves(0x6);
    const bool avx512 = avx2 && bit(b7, 16) && bit(b7, 17) && bit(b7, 30) && bit(b7, 31) && saves(0xE6);
    const bool avx512_bf16 = avx512 && bit(a71, 5);
    // Every CPU with tiles has it, so beside tiles codes are read in this one way.
    const bool avx512_vbmi = avx512_bf16 && bit(c7, 1);
    switch (isa) {
        case PUZZLEMOE_PORTABLE: return true;
        case PUZZLEMOE_AVX2: return avx2;
        case PUZZLEMOE_AVX512: return avx512;
        case PUZZLEMOE_AVX512_BF16: return avx512_bf16;
        case PUZZLEMOE_AVX512_VBMI: return avx512_vbmi;
#ifdef PUZZLEMOE_EMULATE_TILES
        case PUZZLEMOE_AMX_BF16: return avx512_vbmi;
#else
        case PUZZLEMOE_AMX_BF16: return avx512_vbmi && bit(d7, 22) && bit(d7, 24);
#endif
        default: return false;
    }
}

bool kernel_permits_tiles() {
#ifdef PUZZLEMOE_EMULATE_TILES
    return true;
#else
    // ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA (Linux, Documentation/arch/x86/xstate.rst); asking again is harmless,
    // and threads that start later inherit it.
    return saves(0x60000) && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#endif
}

int32_t num_threads() { return omp_in_parallel() ? 1 : omp_get_max_threads(); }

template <class Call>
int64_t run(PuzzleMoeIsa isa, const Call& call) {
    switch (isa) {
        case PUZZLEMOE_AVX2: return run_avx2(call);
        case PUZZLEMOE_AVX512: return run_avx512(call);
        case PUZZLEMOE_AVX512_BF16: return run_avx512_bf16(call);
        case PUZZLEMOE_AVX512_VBMI: return run_avx512_vbmi(call);
        case PUZZLEMOE_AMX_BF16: return run_amx_bf16(call);
        default: return run_portable(call);
    }
}

int64_t activation_bytes(PuzzleMoeIsa isa) { return isa >= PUZZLEMOE_AVX512_BF16 ? 2 : 4; }

}  // namespace
}  // namespace puzzlemoe

using namespace puzzlemoe;

PuzzleMoeIsaStatus puzzlemoe_isa_status(PuzzleMoeIsa isa) {
    if (!cpu_has(isa)) return PUZZLEMOE_CPU_LACKS_IT;
    if (isa == PUZZLEMOE_AMX_BF16 && !kernel_permits_tiles()) return PUZZLEMOE_KERNEL_REFUSES_IT;
    return PUZZLEMOE_USABLE;
}

int64_t puzzlemoe_workspace_bytes(const PuzzleMoeCall* call) {
    PuzzleMoeCall sizes = *call;
    sizes.num_threads = num_threads();
    sizes.workspace = nullptr;
    return lay_out(sizes, activation_bytes(call->isa)).total_bytes;
}

int64_t puzzlemoe_packed_moe(const PuzzleMoeCall* given) {
    PuzzleMoeCall call = *given;
    call.num_threads = num_threads();
    return run(call.isa, call);
}

int64_t puzzlemoe_coded_moe(const PuzzleMoeCodedCall* given) {
    PuzzleMoeCodedCall coded = *given;
    coded.call.num_threads = num_threads();
    return run(coded.call.isa, coded);
}

void puzzlemoe_tile_slot(uint16_t* words, uint16_t* scratch, int64_t rows, int64_t columns, int64_t first_step,
                         int64_t second_begin) {
    const int64_t blocks = rows / kBlockRows, steps = columns / kStepColumns;
    std::memcpy(scratch, words, rows * columns * sizeof(uint16_t));
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first_row[2] = {block * first_step, second_begin + block * first_step};
        for (int64_t step = 0; step < steps; ++step) {
            uint16_t* to = words + (block * steps + step) * kStepWords;
            for (int tile = 0; tile < 2; ++tile)
                for (int row = 0; row < kTileRows; ++row) {
                    const uint16_t* from = scratch + (first_row[tile] + row) * columns + step * kStepColumns;
                    for (int pair = 0; pair < kPairsPerStep; ++pair)
                        std::memcpy(to + tile * kTileWords + pair * kPairWords + 2 * row, from + 2 * pair, 4);
                }
        }
    }
}
