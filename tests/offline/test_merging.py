"""The paper's rule, held against its definition written out element by element."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_puzzle.format import FormatError, unpack
from vllm_puzzle.offline.merging import merge_pair, paper_rule

# BF16 values of both signs, zeros, equal and nearly equal magnitudes among them.
elements = st.sampled_from([0.0, -0.0, 0.5, -0.5, 0.25, 0.21875, -1.0, 0.4296875, 3.0, -0.0625, 2.0**-15])
norms = st.sampled_from([0.0, 0.5, 1.0, 2.0])


def scalar_rule(wi: float, wj: float, ni: float, nj: float, tau: float) -> tuple[float, float]:
    """The two experts' reconstructed weights (the table in section 3 of arXiv 2511.04805), zeros staying zeros."""
    a, b = abs(wi), abs(wj)
    similar = a + b > 0 and abs(a - b) / (a + b) <= tau
    salient_i = a * ni >= b * nj
    magnitude = (a + b) / 2 if similar else (a if salient_i else b)
    return (
        math.copysign(magnitude, wi) if similar or salient_i else 0.0,
        math.copysign(magnitude, wj) if similar or not salient_i else 0.0,
    )


@given(st.lists(st.tuples(elements, elements), min_size=1, max_size=12), norms, norms, st.sampled_from([0.0, 0.3, 0.4]))
def test_paper_rule(pairs: list[tuple[float, float]], ni: float, nj: float, tau: float) -> None:
    weights = tuple(torch.tensor([[pair[member] for pair in pairs]]).bfloat16() for member in (0, 1))
    channel_norms = (torch.full((len(pairs),), ni), torch.full((len(pairs),), nj))
    words, statistics = merge_pair(weights, channel_norms, paper_rule, tau, ("a", "b"))
    expected = [scalar_rule(wi, wj, ni, nj, tau) for wi, wj in pairs]
    for member in (0, 1):
        decoded = unpack(words, member)[0].tolist()
        rounded = [torch.tensor(pair[member]).bfloat16().item() + 0.0 for pair in expected]
        assert decoded == rounded
    kept = sum(value != 0 for pair in expected for value in pair)
    assert (statistics.elements, statistics.kept) == (len(pairs), kept)


def test_each_input_channel_has_its_own_norm() -> None:
    weights = (torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.tensor([[-4.0, -4.0], [4.0, 4.0]]))
    words, _ = merge_pair(weights, (torch.tensor([8.0, 1.0]), torch.ones(2)), paper_rule, 0.4, ("a", "b"))
    assert unpack(words, 0).tolist() == [[1.0, 0.0], [1.0, 0.0]]
    assert unpack(words, 1).tolist() == [[0.0, -4.0], [0.0, 4.0]]


def test_at_tau_04_half_of_two_gaussian_experts_is_shared() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = tuple(torch.randn(400, 300, generator=generator) * 0.02 for _ in range(2))
    _, statistics = merge_pair(weights, (torch.ones(300), torch.ones(300)), paper_rule, 0.4, ("a", "b"))
    # The paper counts about 48 % similar elements, so about 26 % of an expert's weights lost.
    assert statistics.shared_fraction == pytest.approx(0.48, abs=0.03)
    assert statistics.kept_fraction == pytest.approx(0.74, abs=0.02)


def test_blocks_of_rows_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    weights = tuple(torch.randn(37, 11, generator=generator) for _ in range(2))
    channel_norms = tuple(torch.rand(11, generator=generator) for _ in range(2))
    whole = merge_pair(weights, channel_norms, paper_rule, 0.4, ("a", "b"))
    monkeypatch.setattr("vllm_puzzle.offline.merging._ELEMENTS_PER_BLOCK", 30)
    words, statistics = merge_pair(weights, channel_norms, paper_rule, 0.4, ("a", "b"))
    assert torch.equal(words, whole[0])
    assert statistics.relative_error == pytest.approx(whole[1].relative_error)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e6])
@pytest.mark.parametrize("member", [0, 1])
def test_an_element_that_cannot_be_stored_names_its_own_tensor(value: float, member: int) -> None:
    weights = (torch.full((4, 3), 2.0), torch.full((4, 3), 2.0))
    weights[member][2, 1] = value
    with pytest.raises(FormatError, match=rf"^{'ab'[member]}\[2, 1\] is"):
        merge_pair(weights, (torch.ones(3), torch.ones(3)), paper_rule, 0.4, ("a", "b"))
