#define PUZZLEMOE_LANES 16
#include "generic.h"
#include "levels.h"

namespace puzzlemoe {

int64_t run_avx512(const PuzzleMoeCall& call) { return Moe<Generic>(call).run(); }

}  // namespace puzzlemoe
