// The ISA levels' entry points, each compiled in a translation unit of its own.
#pragma once

#include "abi.h"

namespace puzzlemoe {

int64_t run_portable(const PuzzleMoeCall& call);
int64_t run_portable(const PuzzleMoeCodedCall& call);
int64_t run_avx2(const PuzzleMoeCall& call);
int64_t run_avx2(const PuzzleMoeCodedCall& call);
int64_t run_avx512(const PuzzleMoeCall& call);
int64_t run_avx512(const PuzzleMoeCodedCall& call);
int64_t run_avx512_bf16(const PuzzleMoeCall& call);
int64_t run_avx512_bf16(const PuzzleMoeCodedCall& call);
int64_t run_avx512_vbmi(const PuzzleMoeCall& call);
int64_t run_avx512_vbmi(const PuzzleMoeCodedCall& call);
int64_t run_amx_bf16(const PuzzleMoeCall& call);
int64_t run_amx_bf16(const PuzzleMoeCodedCall& call);

}  // namespace puzzlemoe
