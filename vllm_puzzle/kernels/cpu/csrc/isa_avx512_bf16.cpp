#include "avx512_bf16.h"
#include "levels.h"

namespace puzzlemoe {

int64_t run_avx512_bf16(const PuzzleMoeCall& call) { return Moe<Avx512Bf16>(call).run(); }

}  // namespace puzzlemoe
