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

_FILE = Path(__file__).with_name("points.json")

_RESTARTS = 40
_SCREENING_ITERATIONS, _FINAL_ITERATIONS = 60, 400
_SCREENED, _SAMPLES = 1 << 14, 1 << 17
# The best points for a density p lie as densely as its square root (Zador): for a normal density this much wider.
_SPREAD = math.sqrt(2)
# Bounds the distances between samples and points that are in memory.
_SAMPLES_AT_ONCE = 1 << 14


@cache
def _stored_points() -> dict[str, list[list[float]]]:
    content: dict[str, list[list[float]]] = json.loads(_FILE.read_text(encoding="utf-8"))
    return content


def universal_points(bits: int, device: torch.device | None = None) -> torch.Tensor:
    """The points for pairs of standard normal numbers, float32 (2 ** bits, 2); the first is (0, 0)."""
    return torch.tensor(_stored_points()[str(bits)], device=device)


def fit_points(points: torch.Tensor, values: torch.Tensor, costs: torch.Tensor, iterations: int) -> torch.Tensor:
    """Moves points to where the values nearest to them are, by Lloyd's iterations; the first stays (0, 0).

    Args:
        points: float32 (num_points, 2), the first of them (0, 0).
        values: float32 (num_values, 2), what the points stand for.
        costs: of a unit of squared error in each value, float32 (num_values, 2).

    Returns:
        float32 (num_points, 2); a point that no value is nearest to stays where it is.
    """
    for _ in range(iterations):
        sums = torch.zeros(len(points), 4, device=points.device)
        for part, part_costs in zip(values.split(_SAMPLES_AT_ONCE), costs.split(_SAMPLES_AT_ONCE), strict=True):
            weighted = torch.cat([part_costs, part_costs * part], dim=1)
            table = torch.cat([points.square(), -2 * points], dim=1)
            sums.index_add_(0, (weighted @ table.T).argmin(dim=1), weighted)
        weight, total = sums[:, :2], sums[:, 2:]
        # A coordinate that nothing depends on stays too.
        points = torch.where(weight > 0, total / weight.clamp(min=torch.finfo(torch.float32).tiny), points)
        points[0] = 0
    return points


def _normal_pairs(count: int, seed: int) -> torch.Tensor:
    """Pairs of standard normal numbers, float32 (count, 2), spread more evenly than drawn ones."""
    drawn = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed).draw(count, dtype=torch.float64)
    return (math.sqrt(2) * torch.erfinv((2 * drawn - 1).clamp(-1 + 1e-12, 1 - 1e-12))).float()


def distortion(points: torch.Tensor, values: torch.Tensor) -> float:
    """The mean squared error of a coordinate of values, float32 (num_values, 2), coded by the nearest points."""
    total = sum(float(torch.cdist(part, points).amin(dim=1).square().sum()) for part in values.split(_SAMPLES_AT_ONCE))
    return total / values.numel()


def _find_universal_points(bits: int) -> tuple[torch.Tensor, float]:
    """The best points of many restarts, and their distortion."""
    screened, samples, unseen = (
        _normal_pairs(count, seed) for seed, count in enumerate((_SCREENED, _SAMPLES, _SAMPLES))
    )
    tries = []
    for restart in range(_RESTARTS):
        start = _SPREAD * _normal_pairs(1 << bits, 1000 + restart)
        start[0] = 0
        points = fit_points(start, screened, torch.ones_like(screened), _SCREENING_ITERATIONS)
        tries.append((distortion(points, samples), points))
    best = min(tries, key=lambda found: found[0])[1]
    best = fit_points(best, samples, torch.ones_like(samples), _FINAL_ITERATIONS)
    return best, distortion(best, unseen)


def _main() -> None:
    torch.set_num_threads(1)
    rows = []
    for bits in CODE_BITS:
        points, lost = _find_universal_points(bits)
        print(f"{bits} bits: {lost:.6f}", flush=True)
        rows.append(f'"{bits}": {json.dumps([[round(float(x), 5) for x in point] for point in points])}')
    _FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    _main()
