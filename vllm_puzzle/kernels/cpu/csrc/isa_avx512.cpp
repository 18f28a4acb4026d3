#define PUZZLEMOE_LANES 16
#include "codes_avx512.h"
#include "generic_vectors.h"

namespace {

template <int bits>
struct CodeReader {
    const uint16_t* codebook;

    // As in codes_portable.h.
    void read(const uint8_t* codes, int pair, Pairs32* first, Pairs32* second) const {
        __m512i weights[1][2];
        WordReader<bits>{codebook}.read(codes, pair, weights);
        *first = Pairs32(weights[0][0]);
        *second = Pairs32(weights[0][1]);
    }
};

}  // namespace

#include "generic.h"
#include "levels.h"

namespace puzzlemoe {

int64_t run_avx512(const PuzzleMoeCall& call) { return Moe<Generic, Pairs<Generic>>(call, {call}).run(); }
int64_t run_avx512(const PuzzleMoeCodedCall& coded) { return Moe<Generic, Codes<Generic>>(coded.call, {coded}).run(); }

}  // namespace puzzlemoe
