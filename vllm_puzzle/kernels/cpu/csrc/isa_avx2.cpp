#define PUZZLEMOE_LANES 8
#include "generic.h"
#include "levels.h"

namespace puzzlemoe {

int64_t run_avx2(const PuzzleMoeCall& call) { return Moe<Generic>(call).run(); }

}  // namespace puzzlemoe
