"""Universal points, and points fitted to weights."""

import pytest
import torch

from vllm_puzzle.format import CODE_BITS
from vllm_puzzle.offline.coding.points import distortion, fit_points, universal_points

# Of the best scalar levels with as many bits a weight: 4, an average of 6 and 5, 8 and 16.
SCALAR_LEVELS = {4: 0.11748, 5: 0.0690, 6: 0.03454, 8: 0.009497}


@pytest.mark.parametrize("bits", CODE_BITS)
def test_universal_points_code_normal_numbers_better_than_any_levels(bits: int) -> None:
    points = universal_points(bits)
    assert points.shape == (1 << bits, 2)
    assert points[0].tolist() == [0, 0]
    assert len(points.bfloat16().unique(dim=0)) == len(points)
    pairs = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(1))
    assert distortion(points, pairs) < {4: 0.93, 5: 0.84, 6: 0.87, 8: 0.84}[bits] * SCALAR_LEVELS[bits]


def weighted_distortion(points: torch.Tensor, weights: torch.Tensor, costs: torch.Tensor) -> float:
    """By brute force: with scales of one."""
    errors = (weights.flatten(1).T[:, None] - points).square() * costs.expand_as(weights).flatten(1).T[:, None]
    return float(errors.sum(dim=2).amin(dim=1).sum())


def test_points_go_where_errors_count() -> None:
    """The first halves count a hundred times as much, and the last column ten times as much as any other."""
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(2, 40, 50, generator=generator)
    rows, columns = torch.tensor([[1.0], [0.01]]).expand(2, 40), torch.ones(50)
    columns[-1] = 10
    costs = rows[..., None] * columns
    start = universal_points(4)
    fitted = fit_points(start, weights, torch.ones(2, 40), columns, rows, 10)
    assert weighted_distortion(fitted, weights, costs) < 0.75 * weighted_distortion(start, weights, costs)
    assert fitted[0].tolist() == [0, 0]


def test_points_are_in_units_of_the_scales() -> None:
    weights = torch.randn(2, 6, 70, generator=torch.Generator().manual_seed(3))
    scales = torch.linspace(0.5, 8, 12).view(2, 6)
    plain = fit_points(universal_points(5), weights, torch.ones(2, 6), torch.ones(70), torch.ones(2, 6), 3)
    costs = scales.square().reciprocal()
    scaled = fit_points(universal_points(5), weights * scales[..., None], scales, torch.ones(70), costs, 3)
    torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-5)


def test_a_point_that_nothing_is_near_stays() -> None:
    weights = torch.full((2, 3, 5), 0.9)
    start = universal_points(4)
    fitted = fit_points(start, weights, torch.ones(2, 3), torch.ones(5), torch.ones(2, 3), 4)
    moved = (fitted != start).any(dim=1)
    assert int(moved.sum()) == 1
    torch.testing.assert_close(fitted[moved], torch.full((1, 2), 0.9))
