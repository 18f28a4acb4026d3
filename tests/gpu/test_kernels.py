"""The compiled kernels on a device: decoders, every configuration, graph capture, no waiting.

They need torch, Triton, pydantic and pytest, nothing else; those of `tests/kernels` marked `gpu` are alike.
"""

import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.cases import TOLERANCE, Case
from vllm_puzzle.kernels import TRITON, packed_moe
from vllm_puzzle.kernels.triton.configs import FOLDER, load_configs
from vllm_puzzle.kernels.triton.decode import decode, make_decoder
from vllm_puzzle.kernels.triton.moe import DTYPES, triton_moe
from vllm_puzzle.kernels.triton.target import current_target

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
PRODUCTS = ("gate_up", "down")


@triton.jit
def decode_kernel(words_ptr, weights_ptr, DECODER: tl.constexpr, SIZE: tl.constexpr):
    index = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    words = tl.load(words_ptr + index)
    tl.store(weights_ptr + index, decode(words, 0, DECODER))
    tl.store(weights_ptr + tl.num_programs(0) * SIZE + index, decode(words, 1, DECODER))


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_decoders_give_the_same_bits_for_every_word(dtype: torch.dtype) -> None:
    """PTX, where the device understands it, against plain Triton: both compiled."""
    words = torch.arange(-(2**15), 2**15, device=DEVICE).to(torch.int16)
    results = []
    for ptx in {False, current_target(DEVICE).ptx}:
        decoder = make_decoder(DTYPES[dtype], ptx)
        weights = torch.empty(2, 2**16, dtype=dtype, device=DEVICE)
        decode_kernel[(64,)](words, weights, DECODER=decoder, SIZE=1024)
        legal = ((words >> 7 & 31) > 0) & ((words >> 7 & 31) <= decoder.largest_exponent)
        results.append(weights[:, legal].view(torch.int16))
    assert torch.equal(results[0], results[-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 8, 33, 300])
def test_every_configuration_of_this_device(dtype: torch.dtype, num_tokens: int) -> None:
    case = Case(num_tokens, 16, 7, top_k=4, hidden_size=1024, intermediate_size=768, dtype=dtype)
    expected = case.expected()
    for config in load_configs(FOLDER / f"{current_target(DEVICE).family}.json").values():
        for split_k in (1, 2):
            split = {name: getattr(config, name).model_copy(update={"split_k": split_k}) for name in PRODUCTS}
            got = triton_moe(*case.tensors(TRITON), "silu", False, config.model_copy(update=split))
            case.compare(got.cpu(), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("num_tokens", [1, 7, 64, 400])
def test_a_captured_call_is_replayed_with_other_tokens(num_tokens: int) -> None:
    case = Case(num_tokens, 32, 16, top_k=4, hidden_size=256, intermediate_size=128)
    arguments = case.tensors(TRITON)
    x, _, _, _, _, topk_ids = arguments
    packed_moe(*arguments, "silu", engine=TRITON)  # Compiles, which a capture must not.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = packed_moe(*arguments, "silu", engine=TRITON)
    for seed in range(3):
        other = Case(num_tokens, 32, 16, top_k=4, hidden_size=256, intermediate_size=128, seed=seed)
        case.x, case.topk_ids = other.x, other.topk_ids
        case.topk_ids[:: seed + 2] = -1
        x.copy_(case.x)
        topk_ids.copy_(case.topk_ids)
        graph.replay()
        case.compare(output.cpu(), case.expected(), TOLERANCE[torch.bfloat16])


def test_a_call_does_not_wait_for_the_device() -> None:
    arguments = Case(num_tokens=40, num_experts=16, pairs=8, top_k=4).tensors(TRITON)
    packed_moe(*arguments, "silu", engine=TRITON)
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed_moe(*arguments, "silu", engine=TRITON)
    finally:
        torch.cuda.set_sync_debug_mode("default")
