#define PUZZLEMOE_LANES 8
#include "codes_avx2.h"
#include "generic.h"
#include "levels.h"

namespace puzzlemoe {

int64_t run_avx2(const PuzzleMoeCall& call) { return Moe<Generic, Pairs<Generic>>(call, {call}).run(); }
int64_t run_avx2(const PuzzleMoeCodedCall& coded) {
    return Moe<Generic, Codes<Generic>>(coded.call, {coded}).run();
}

}  // namespace puzzlemoe
