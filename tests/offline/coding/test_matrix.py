"""A coded matrix: what its output loses, and odd weights and inputs."""

from itertools import pairwise

import pytest
import torch

from tests.offline.coding.problems import in_torch, output_error, problem
from vllm_puzzle.format import CODE_BITS, check_codebook, decode
from vllm_puzzle.offline.coding.matrix import CodedMatrix, code_matrix


def error_of(matrix: CodedMatrix, weights: torch.Tensor, moments: torch.Tensor, costs: torch.Tensor) -> float:
    return output_error(matrix.decoded(), weights, moments, costs)


@pytest.mark.parametrize("bits", CODE_BITS)
def test_with_moments_the_output_changes_far_less_than_by_nearest_points(bits: int) -> None:
    weights, moments, costs = problem(24, 96)
    matrix = code_matrix(weights, moments, costs, bits)
    nearest = code_matrix(weights, moments.diagonal(), costs, bits)
    for each in (matrix, nearest):
        assert each.codes.shape == (24, 96)
        assert each.codebook.shape == (1 << bits, 2)
        assert each.codebook.dtype == each.scales.dtype == torch.bfloat16
        assert torch.equal(each.decoded(), decode(each.codes, each.codebook, each.scales))
        check_codebook(each.codebook, each.scales)
    assert error_of(matrix, weights, moments, costs) < 0.5 * error_of(nearest, weights, moments, costs)


def test_each_bit_more_nearly_halves_the_error() -> None:
    weights, moments, costs = problem(32, 80)
    errors = [error_of(code_matrix(weights, moments, costs, bits), weights, moments, costs) for bits in CODE_BITS]
    for narrower, wider in pairwise(errors):
        assert wider < 0.6 * narrower


def integers(weights: torch.Tensor, moments: torch.Tensor, costs: torch.Tensor, levels: int) -> float:
    """The output error of symmetric integers, a clipped scale a row, errors pushed on as GPTQ does."""
    order = moments.diagonal().argsort(descending=True)
    damped = moments[order][:, order].double()
    damped.diagonal().add_(0.01 * damped.diagonal().mean())
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    best = torch.full(weights.shape[:2], torch.inf, dtype=torch.float64)
    for clip in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4):
        scale = clip * weights.double().abs().amax(dim=2) / (levels / 2 - 0.5)
        remaining, rounded = weights[:, :, order].double().clone(), torch.zeros_like(weights, dtype=torch.float64)
        for k, column in enumerate(order.tolist()):
            steps = (remaining[:, :, k] / scale).round().clamp(-levels // 2, levels // 2 - 1)
            rounded[:, :, column] = steps * scale
            error = (remaining[:, :, k] - rounded[:, :, column]) / factor[k, k]
            remaining[:, :, k + 1 :] -= error[..., None] * factor[k, k + 1 :]
        change = rounded - weights
        best = torch.minimum(best, ((change @ moments.double()) * change).sum(dim=2))
    return float((best * costs).sum())


@pytest.mark.parametrize(("bits", "most"), [(4, 0.72), (6, 0.74), (8, 0.76)])
def test_codes_lose_less_than_compensated_integers_of_the_same_bits(bits: int, most: float) -> None:
    weights, moments, costs = problem(64, 128, seed=4)
    coded = error_of(code_matrix(weights, moments, costs, bits), weights, moments, costs)
    assert coded < most * integers(weights, moments, costs, 1 << bits // 2)


def test_points_are_spent_on_the_half_that_counts() -> None:
    weights, moments, costs = problem(32, 64)
    uneven = costs * torch.tensor([[16.0], [1.0]])
    even_handed = code_matrix(weights, moments, costs, 5)
    aware = code_matrix(weights, moments, uneven, 5)
    assert error_of(aware, weights, moments, uneven) < 0.9 * error_of(even_handed, weights, moments, uneven)


@pytest.mark.parametrize("full", [True, False])
def test_weights_of_zero_stay_zero(full: bool) -> None:
    weights, moments, costs = problem(6, 40)
    weights[0, 2] = 0
    weights[:, 4] = 0
    matrix = code_matrix(weights, moments if full else moments.diagonal(), costs, 4)
    decoded = matrix.decoded()
    assert bool(decoded.isfinite().all())
    assert float(decoded[0, 2].abs().max()) == 0
    assert float(decoded[:, 4].abs().max()) == 0
    assert float((decoded[1, 2] - weights[1, 2]).norm()) < 0.5 * float(weights[1, 2].norm())


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (3, 65)])
def test_inputs_and_rows_that_count_nothing_are_coded_all_the_same(full: bool, shape: tuple[int, int]) -> None:
    weights, moments, costs = problem(*shape)
    for nothing in (torch.zeros_like(moments), moments):
        matrix = code_matrix(weights, nothing if full else nothing.diagonal(), costs * (nothing is moments), 6)
        assert bool(matrix.decoded().isfinite().all())
        assert float(matrix.decoded().abs().max()) < 3 * float(weights.abs().max())


def test_one_huge_weight_does_not_spoil_its_row() -> None:
    weights, moments, costs = problem(8, 64)
    weights[0, 3, 5] = 3.0
    decoded = code_matrix(weights, moments, costs, 8).decoded()
    assert 0.5 < float(decoded[0, 3, 5]) < 4
    assert bool(decoded.isfinite().all())


@pytest.mark.parametrize("full", [True, False])
def test_compiled_and_in_torch_a_matrix_comes_out_alike(full: bool) -> None:
    weights, moments, costs = problem(20, 70)
    inputs = moments if full else moments.diagonal().contiguous()
    made = code_matrix(weights, inputs, costs, 5)
    with in_torch():
        expected = code_matrix(weights, inputs, costs, 5)
    for name in ("codes", "codebook", "scales"):
        assert torch.equal(getattr(made, name), getattr(expected, name))


@pytest.mark.parametrize("exponent", [-90, 70])
def test_very_small_and_very_large_weights_are_coded_alike(exponent: int) -> None:
    """Their squares are no float32 numbers."""
    weights, moments, costs = torch.randn(2, 12, 64), torch.eye(64), torch.ones(2, 12)
    for statistics in (moments, moments.diagonal()):
        usual, scaled = (code_matrix(each, statistics, costs, 6) for each in (weights, weights * 2.0**exponent))
        assert torch.equal(usual.codes, scaled.codes)
        assert torch.equal(usual.decoded() * 2.0**exponent, scaled.decoded())
