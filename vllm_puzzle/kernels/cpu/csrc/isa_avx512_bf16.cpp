#include "avx512_bf16.h"
#include "levels.h"

namespace puzzlemoe {

int64_t run_avx512_bf16(const PuzzleMoeCall& call) { return Moe<Avx512Bf16, Pairs<Avx512Bf16>>(call, {call}).run(); }
int64_t run_avx512_bf16(const PuzzleMoeCodedCall& coded) {
    return Moe<Avx512Bf16, Codes<Avx512Bf16>>(coded.call, {coded}).run();
}

}  // namespace puzzlemoe
