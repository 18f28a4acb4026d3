"""Every CPU level over a sample of calls, with the library whose path is the argument; run under sanitizers.

AMX is among the levels on every CPU that has AVX512-VBMI: the library given here emulates its tiles.
"""

import sys
from functools import partial
from pathlib import Path

import torch

from tests.kernels.cases import Call, Case, check_what_is_not_finite
from tests.kernels.coded_cases import CodedCase
from vllm_puzzle.format import CODE_BITS
from vllm_puzzle.kernels.cpu import WORKSPACE, library, usable_isas


def sample() -> list[Call]:
    """Calls that reach every kernel, with tails in every dimension."""
    return [*packed_sample(), *coded_sample()]


def coded_sample() -> list[CodedCase]:
    """Few and many rows an expert, at every width."""
    cases = [CodedCase(0), CodedCase(1, 1, 1, 1, 1), CodedCase(7, 64, 8, 96, 64)]
    for bits in CODE_BITS:
        for num_tokens in (1, 2, 6, 11, 40):
            cases.append(CodedCase(num_tokens, 2, 1, 70, 33, seed=num_tokens, widths=(bits,)))
            cases[-1].topk_ids[:] = 1
    cases[1].make_positive()
    cases[2].topk_ids[3:5] = -1
    return cases


def packed_sample() -> list[Case]:
    cases = [
        Case(num_tokens, num_experts, pairs, top_k, hidden_size, intermediate_size, seed=num_tokens)
        for num_tokens, num_experts, pairs, top_k, hidden_size, intermediate_size in [
            (0, 8, 3, 2, 32, 32),
            (1, 8, 4, 2, 64, 32),
            (1, 1, 0, 1, 1, 1),
            (7, 256, 128, 8, 96, 64),
            (30, 6, 2, 3, 100, 45),
            (90, 3, 1, 2, 160, 96),
            (300, 8, 4, 2, 33, 70),
        ]
    ]
    cases[4].topk_ids[3:9] = -1
    cases[6].topk_ids[:] = 5
    return cases


def main() -> None:
    library.LIBRARY_PATH = Path(sys.argv[1])
    levels = usable_isas()
    for case in sample():
        for isa in levels:
            # A workspace of exactly the size asked for, so that what runs over its end is seen.
            WORKSPACE.release()
            case.check(engine=f"cpu-{isa.name.lower()}")
    for isa in levels:
        for num_tokens in (8, 90):  # Some rows a tile, and several tiles with a part of one.
            case = Case(num_tokens, num_experts=4, pairs=2, hidden_size=40)
            check_what_is_not_finite(case, partial(case.run, engine=f"cpu-{isa.name.lower()}"))
        coded = CodedCase(13, num_experts=4, hidden_size=40)
        check_what_is_not_finite(coded, partial(coded.run, engine=f"cpu-{isa.name.lower()}"))
    for dtype in (torch.float16, torch.float32):
        for activation in ("silu", "gelu", "gelu_tanh"):
            Case(num_tokens=11, hidden_size=50, dtype=dtype).check(activation, engine="cpu-portable")
            CodedCase(num_tokens=11, hidden_size=50, dtype=dtype).check(activation, engine="cpu-portable")
    print(*(isa.name.lower() for isa in levels))


if __name__ == "__main__":
    main()
