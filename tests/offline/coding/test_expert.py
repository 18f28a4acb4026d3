"""Coded experts: what is stored of them, what a layer of them answers, and what down makes up for."""

from collections.abc import Sequence

import pytest
import torch

from tests.offline.small import HIDDEN_SIZE, NUM_EXPERTS, names_of, small_experts, small_tokens
from vllm_puzzle.format import (
    CODEBOOK_SUFFIX,
    PACKED_SUFFIX,
    CodedShape,
    FormatError,
    LayerCodes,
    coded_tensors,
    decode,
    join_rows,
    split_rows,
    unpack_codes,
)
from vllm_puzzle.offline.coding.code_layer import CodingStatistics, code_layer
from vllm_puzzle.offline.coding.expert import CodedExpert
from vllm_puzzle.offline.merging.layer import ExpertWeights, LayerTokens, RoutedTokens

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def routed() -> RoutedTokens:
    return small_tokens(900)


def code(
    experts: ExpertWeights,
    codes: LayerCodes,
    routed: RoutedTokens | None = None,
    lacking: torch.Tensor | None = None,
) -> tuple[list[CodedExpert], ExpertWeights, CodingStatistics]:
    """What is emitted, and the experts that a reader of it has."""
    emitted: list[CodedExpert] = []
    read = ExpertWeights.unread(experts.num_experts, experts.activation)

    def emit(expert: int, coded: CodedExpert) -> None:
        assert expert == len(emitted)
        emitted.append(coded)
        read.put(expert, coded.matrices())

    tokens = None if routed is None else LayerTokens(routed, 1.0, lacking)
    statistics = code_layer(experts.matrices, experts.activation, names_of(experts), codes, emit, tokens)
    return emitted, read, statistics


def error(layer: ExpertWeights, experts: ExpertWeights, routed: RoutedTokens) -> float:
    wanted = routed.through(experts)
    return float((routed.through(layer) - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(24, 20), (35, 33)])
@pytest.mark.parametrize("bits", [(4, 8), (6, 5)])
def test_what_is_stored_is_what_a_reader_decodes(
    hidden_size: int, intermediate_size: int, bits: tuple[int, int]
) -> None:
    experts = small_experts(2, hidden_size, intermediate_size)
    tokens = small_tokens(50, num_experts=2, hidden_size=hidden_size)
    codes = LayerCodes(layer=0, w13_bits=[bits[0]] * 2, w2_bits=[bits[1]] * 2)
    for coded in code(experts, codes, tokens)[0]:
        stored = dict(zip(coded_tensors("p", 0, PROJECTIONS), coded.tensors(), strict=True))
        by_kind = {(name.projection[:4], name.suffix): tensor for name, tensor in stored.items()}
        shapes = [
            kind(hidden_size, intermediate_size, width)
            for kind, width in zip((CodedShape.of_w13, CodedShape.of_w2), bits, strict=True)
        ]
        for shape, name in zip(shapes, ("gate", "down"), strict=True):
            assert by_kind[name, PACKED_SUFFIX].shape == shape.packed
            assert by_kind[name, PACKED_SUFFIX].dtype == torch.int32
            assert by_kind[name, CODEBOOK_SUFFIX].shape == shape.codebook
        gate_scale, up_scale, down_scale = (tensor for name, tensor in stored.items() if name.suffix == "weight_scale")
        assert down_scale.shape == (hidden_size,)
        gate, up = decode(
            unpack_codes(by_kind["gate", PACKED_SUFFIX], bits[0], hidden_size),
            by_kind["gate", CODEBOOK_SUFFIX],
            torch.stack([gate_scale, up_scale]),
        )
        halves = decode(
            unpack_codes(by_kind["down", PACKED_SUFFIX], bits[1], intermediate_size),
            by_kind["down", CODEBOOK_SUFFIX],
            split_rows(down_scale[:, None])[..., 0],
        )
        expected = [gate, up, join_rows(halves, hidden_size)]
        for matrix, decoded in zip(coded.matrices(), expected, strict=True):
            assert torch.equal(matrix, decoded.bfloat16())
        assert all(tensor.is_contiguous() for tensor in stored.values())


def test_a_layer_coded_with_its_tokens_answers_more_like_the_source(routed: RoutedTokens) -> None:
    experts = small_experts()
    codes = LayerCodes.even(0, NUM_EXPERTS, 5)
    plain, compensated, corrected = (
        code(experts, codes, tokens, lacking)[1]
        for tokens, lacking in ((None, None), (routed, None), (routed, torch.zeros_like(routed.hidden)))
    )
    assert error(compensated, experts, routed) < 0.7 * error(plain, experts, routed)
    assert error(corrected, experts, routed) < 0.9 * error(compensated, experts, routed)


def test_part_of_a_drift_is_given_back_and_what_is_left_is_known(routed: RoutedTokens) -> None:
    experts = small_experts()
    answer = routed.through(experts)
    drift = 0.3 * answer.norm(dim=1).mean() * torch.ones(HIDDEN_SIZE) / HIDDEN_SIZE**0.5
    lacking = drift.expand_as(answer).clone()
    layer = code(experts, LayerCodes.even(0, NUM_EXPERTS, 6), routed, lacking)[1]
    left = answer + drift - routed.through(layer)
    assert float(left.norm()) < 0.85 * float(drift.expand_as(answer).norm())
    assert float((lacking - left).norm()) < 1e-3 * float(left.norm())


def test_wider_codes_of_one_expert_leave_the_others_as_they_are(routed: RoutedTokens) -> None:
    experts = small_experts()
    even = code(experts, LayerCodes.even(0, NUM_EXPERTS, 4), routed)[1]
    widths = [4, 4, 8, 4, 4, 4]
    uneven = code(experts, LayerCodes(layer=0, w13_bits=widths, w2_bits=widths), routed)[1]
    for expert in range(NUM_EXPERTS):
        same = [torch.equal(a, b) for a, b in zip(even.matrices(expert), uneven.matrices(expert), strict=True)]
        assert all(same) == (expert != 2)


@pytest.mark.parametrize("num_tokens", [1, 7])
def test_few_tokens_and_idle_experts_keep_weights_near_the_source(num_tokens: int) -> None:
    experts, few = small_experts(), small_tokens(num_tokens, idle=(1, 4))
    layer = code(experts, LayerCodes.even(0, NUM_EXPERTS, 5), few, torch.zeros_like(few.hidden))[1]
    for expert in range(NUM_EXPERTS):
        for coded, source in zip(layer.matrices(expert), experts.matrices(expert), strict=True):
            assert float((coded.float() - source.float()).square().sum()) < 0.5 * float(source.float().square().sum())


def test_experts_without_any_weight_are_coded_too(routed: RoutedTokens) -> None:
    experts = small_experts()
    experts.put(3, [torch.zeros_like(matrix) for matrix in experts.matrices(3)])
    layer = code(experts, LayerCodes.even(0, NUM_EXPERTS, 4), routed, torch.zeros_like(routed.hidden))[1]
    assert float(layer.output(3, routed.hidden).abs().max()) == 0
    assert bool(routed.through(layer).isfinite().all())


def test_each_expert_is_read_once_and_alone(routed: RoutedTokens) -> None:
    experts, log = small_experts(), list[str]()

    def read(expert: int) -> Sequence[torch.Tensor]:
        log.append(f"read {expert}")
        return experts.matrices(expert)

    codes = LayerCodes.even(0, NUM_EXPERTS, 4)
    tokens = LayerTokens(routed, 1.0, torch.zeros_like(routed.hidden))
    code_layer(
        read, experts.activation, names_of(experts), codes, lambda expert, _: log.append(f"emit {expert}"), tokens
    )
    assert log == [f"{what} {expert}" for expert in range(NUM_EXPERTS) for what in ("read", "emit")]


def test_the_statistics_are_those_of_the_weights() -> None:
    experts = small_experts()
    _, layer, statistics = code(experts, LayerCodes.even(0, NUM_EXPERTS, 5))
    pairs = [
        (coded.float(), source.float())
        for expert in range(NUM_EXPERTS)
        for coded, source in zip(layer.matrices(expert), experts.matrices(expert), strict=True)
    ]
    lost = sum(float((coded - source).square().sum()) for coded, source in pairs)
    assert statistics.relative_error == pytest.approx(lost / sum(float(s.square().sum()) for _, s in pairs), rel=1e-5)
    assert statistics.weights == sum(source.numel() for _, source in pairs)
    # Of Gaussian weights 2.5 bits a weight leave some 6 per cent, of few less, since their own points are theirs.
    assert 0.02 < statistics.relative_error < 0.06


def test_a_weight_that_is_not_finite_is_refused_by_name() -> None:
    experts = small_experts()
    experts.up[2] = experts.up[2].clone()
    experts.up[2][3, 5] = torch.inf
    with pytest.raises(FormatError, match=r"2\.up\[3, 5\] is inf: codes stand for finite numbers; repair the tensor"):
        code(experts, LayerCodes.even(0, NUM_EXPERTS, 4))
