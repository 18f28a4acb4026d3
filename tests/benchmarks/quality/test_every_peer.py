"""What every method that merging is compared with has in common."""

import pytest
import torch
from torch.nn.functional import silu

from benchmarks.quality.peers import PEERS
from benchmarks.quality.round_to_nearest import round_to_fp8, round_to_int4
from tests.benchmarks.quality.layers import (
    MATRICES,
    NUM_EXPERTS,
    clusters,
    compress,
    error,
    random_experts,
    random_tokens,
)
from vllm_puzzle.offline.merging.layer import ExpertWeights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("slug", PEERS)
def test_every_method_survives_unused_experts_and_repeats_itself(slug: str, dtype: torch.dtype) -> None:
    random_layer = random_experts()
    before = ExpertWeights(
        *([weight.to(dtype) for weight in getattr(random_layer, name)] for name in MATRICES), activation=silu
    )
    tokens = random_tokens(unused=(0, 3, 5, 6, 7))
    experts = ExpertWeights(*([weight.clone() for weight in getattr(before, name)] for name in MATRICES), silu)
    first, second = (compress(slug, experts, tokens) for _ in range(2))
    assert first.dropped == second.dropped
    for name in MATRICES:
        for expert in range(NUM_EXPERTS):
            result, original = getattr(first.experts, name)[expert], getattr(before, name)[expert]
            assert torch.equal(result, getattr(second.experts, name)[expert])
            assert torch.equal(getattr(experts, name)[expert], original)
            assert result.isfinite().all()
            assert result.shape == original.shape
            assert result.dtype in (torch.float32, torch.bfloat16)
    assert error(first.experts, before, tokens) < 1.2
    if slug in ("hc-smoe", "m-smoe", "sub-moe"):
        assert len(clusters(first.experts)) == NUM_EXPERTS // 2


def test_rounding_and_the_bits_of_every_method() -> None:
    experts, tokens = random_experts(), random_tokens()
    for slug, rounding in (("fp8", round_to_fp8), ("int4", round_to_int4)):
        rounded = compress(slug, experts, tokens).experts
        for name in MATRICES:
            pairs = zip(getattr(rounded, name), getattr(experts, name), strict=True)
            assert all(torch.equal(result, rounding(weight)) for result, weight in pairs)
    bits = {slug: peer.bits for slug, peer in PEERS.items() if peer.bits is not None}
    assert bits.pop("int4") == 4.125
    assert (bits.pop("wanda"), bits.pop("sparsegpt")) == (9, 9)
    assert set(bits.values()) == {8}
    for slug, peer in PEERS.items():
        assert (peer.bits is None) == (compress(slug, experts, tokens).bits is not None)
