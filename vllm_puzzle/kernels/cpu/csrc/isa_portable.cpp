#define PUZZLEMOE_LANES 4
#include "codes_portable.h"
#include "generic.h"
#include "levels.h"

namespace puzzlemoe {

int64_t run_portable(const PuzzleMoeCall& call) { return Moe<Generic, Pairs<Generic>>(call, {call}).run(); }
int64_t run_portable(const PuzzleMoeCodedCall& coded) {
    return Moe<Generic, Codes<Generic>>(coded.call, {coded}).run();
}

}  // namespace puzzlemoe
