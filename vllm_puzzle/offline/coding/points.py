"""Codebooks: the universal points that every fit starts from, and fitting them to an expert's weights.

The universal points are the best that were found for pairs of standard normal numbers, one of them (0, 0). They are a
data file beside this one, which `python -m vllm_puzzle.offline.coding.points` makes again.
"""

import json
import math
from functools import cache
from pathlib import Path

import torch

from vllm_puzzle.format import CODE_BITS

from .columns import nearest_codes
from .table import Table

_FILE = Path(__file__).with_name("points.json")

_RESTARTS = 100
_SCREENING_ITERATIONS, _FINAL_ITERATIONS = 100, 1000
_SCREENED, _SAMPLES = 1 << 14, 1 << 17
# The best points for a density p lie as densely as its square root (Zador): for a normal density this much wider.
_SPREAD = math.sqrt(2)
# Codes that points are fitted to at most: a thousand for each of 256 points.
_MOST_CODES = 1 << 18


@cache
def _stored_points() -> dict[str, list[list[float]]]:
    content: dict[str, list[list[float]]] = json.loads(_FILE.read_text(encoding="utf-8"))
    return content


def universal_points(bits: int, device: torch.device | None = None) -> torch.Tensor:
    """The points for pairs of standard normal numbers, float32 (2 ** bits, 2); the first is (0, 0)."""
    return torch.tensor(_stored_points()[str(bits)], device=device)


def fit_points(
    points: torch.Tensor,
    weights: torch.Tensor,
    scales: torch.Tensor,
    column_costs: torch.Tensor,
    row_costs: torch.Tensor,
    iterations: int,
) -> torch.Tensor:
    """Moves points to where the weights nearest to them are, by Lloyd's iterations; the first stays (0, 0).

    Args:
        points: float32 (num_points, 2), the first of them (0, 0).
        weights: float32 (2, rows, columns), in units of `scales`, float32 (2, rows), what the points stand for. Of
            many rows some are read.
        column_costs, row_costs: their product is what a unit of squared error costs in a weight, float32 (columns,)
            and (2, rows).

    Returns:
        float32 (num_points, 2); a point that no weight is nearest to stays where it is.
    """
    step = -(-weights[0].numel() // _MOST_CODES)
    weights, scales, row_costs = (each[:, ::step].contiguous() for each in (weights, scales, row_costs))
    wanted = ((row_costs * scales)[..., None] * column_costs * weights).flatten(1)
    norms = ((row_costs * scales.square())[..., None] * column_costs).expand_as(weights).flatten(1)
    for _ in range(iterations):
        codes = nearest_codes(weights, Table.of(points, scales, row_costs)).flatten()
        total, norm = (
            torch.stack([torch.bincount(codes, half, len(points)) for half in each], dim=1) for each in (wanted, norms)
        )
        # A coordinate that nothing depends on stays too.
        points = torch.where(norm > 0, (total / norm).float(), points)
        points[0] = 0
    return points


def distortion(points: torch.Tensor, pairs: torch.Tensor) -> float:
    """The mean squared error of each number of pairs, float32 (2, num_pairs), coded by the nearest points."""
    return float((_table(points).decoded(nearest_codes(pairs[:, None], _table(points)))[:, 0] - pairs).square().mean())


def _table(points: torch.Tensor) -> Table:
    return Table.of(points, torch.ones(2, 1), torch.ones(2, 1))


def _normal_pairs(count: int, seed: int) -> torch.Tensor:
    """Pairs of standard normal numbers, float32 (2, count), spread more evenly than drawn ones."""
    drawn = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed).draw(count, dtype=torch.float64)
    return (math.sqrt(2) * torch.erfinv((2 * drawn - 1).clamp(-1 + 1e-12, 1 - 1e-12))).float().T.contiguous()


def _find_universal_points(bits: int) -> tuple[torch.Tensor, float]:
    """The best points of many restarts, and their distortion."""
    screened, samples, unseen = (
        _normal_pairs(count, seed) for seed, count in enumerate((_SCREENED, _SAMPLES, _SAMPLES))
    )

    def fit(points: torch.Tensor, pairs: torch.Tensor, iterations: int) -> torch.Tensor:
        ones = torch.ones(2, 1)
        return fit_points(points, pairs[:, None], ones, torch.ones(pairs.shape[1]), ones, iterations)

    tries = []
    for restart in range(_RESTARTS):
        start = _SPREAD * _normal_pairs(1 << bits, 1000 + restart).T
        start[0] = 0
        points = fit(start, screened, _SCREENING_ITERATIONS)
        tries.append((distortion(points, samples), points))
    best = fit(min(tries, key=lambda found: found[0])[1], samples, _FINAL_ITERATIONS)
    return best, distortion(best, unseen)


def _main() -> None:
    rows = []
    for bits in CODE_BITS:
        points, lost = _find_universal_points(bits)
        print(f"{bits} bits: a mean squared error of {lost:.6f}", flush=True)
        rows.append(f'"{bits}": {json.dumps([[round(float(x), 5) for x in point] for point in points])}')
    _FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    _main()
