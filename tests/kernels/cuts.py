"""Ways of cutting the Triton engine's products, and a call cut so against what it must give."""

from tests.kernels.cases import INTERPRETED_TOLERANCE, TOLERANCE, Case
from vllm_puzzle.kernels import REFERENCE, TRITON
from vllm_puzzle.kernels.triton.configs import Config, Product
from vllm_puzzle.kernels.triton.moe import triton_moe
from vllm_puzzle.kernels.triton.target import INTERPRETED

Cut = tuple[int, int, bool, int, int, int]
CUTS: list[Cut] = [
    # members, block_tokens, weights_first, block_rows, block_k, split_k
    (2, 8, True, 32, 16, 1),
    (2, 16, False, 16, 32, 2),
    (2, 16, True, 64, 32, 3),
    (1, 16, False, 32, 16, 3),
    (1, 32, True, 16, 64, 1),
    (1, 16, True, 128, 16, 2),
]


def make_config(
    members: int, block_tokens: int, weights_first: bool, block_rows: int, block_k: int, split_k: int
) -> Config:
    product = Product(block_rows=block_rows, block_k=block_k, split_k=split_k, num_warps=4, num_stages=2)
    return Config(
        members=members, block_tokens=block_tokens, weights_first=weights_first, gate_up=product, down=product
    )


def check(case: Case, cut: Cut, activation: str = "silu", on_input: bool = False) -> None:
    """Against float64, and against the reference engine."""
    got = triton_moe(*case.tensors(TRITON), activation, on_input, make_config(*cut)).cpu()
    tolerance = (INTERPRETED_TOLERANCE if INTERPRETED else TOLERANCE)[case.x.dtype]
    case.compare(got, case.expected(activation, on_input), tolerance)
    case.compare(got, case.run(activation, on_input, REFERENCE).double(), tolerance)
