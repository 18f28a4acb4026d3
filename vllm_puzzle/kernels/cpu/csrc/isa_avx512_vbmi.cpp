#include "avx512_bf16.h"
#include "codes_vbmi.h"
#include "levels.h"

namespace puzzlemoe {

// Pairs look nothing up.
int64_t run_avx512_vbmi(const PuzzleMoeCall& call) { return run_avx512_bf16(call); }
int64_t run_avx512_vbmi(const PuzzleMoeCodedCall& coded) {
    using Isa = Avx512Bf16<VbmiReader>;
    return Moe<Isa, Codes<Isa>>(coded.call, {coded}).run();
}

}  // namespace puzzlemoe
