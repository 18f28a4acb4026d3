#include "avx512_bf16.h"
#include "levels.h"

namespace puzzlemoe {

using Isa = Avx512Bf16<WordReader>;

int64_t run_avx512_bf16(const PuzzleMoeCall& call) { return Moe<Isa, Pairs<Isa>>(call, {call}).run(); }
int64_t run_avx512_bf16(const PuzzleMoeCodedCall& coded) { return Moe<Isa, Codes<Isa>>(coded.call, {coded}).run(); }

}  // namespace puzzlemoe
