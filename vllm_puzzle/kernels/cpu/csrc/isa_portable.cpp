#define PUZZLEMOE_LANES 4
#include "generic.h"
#include "levels.h"

namespace puzzlemoe {

int64_t run_portable(const PuzzleMoeCall& call) { return Moe<Generic>(call).run(); }

}  // namespace puzzlemoe
