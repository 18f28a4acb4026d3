"""Coding one matrix: scales of its rows, points for its weights, then codes that change its output least."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_puzzle.format import decode

from .columns import Moments, Table, compensate, descend, nearest_codes
from .points import fit_points, universal_points

_FIT_ITERATIONS, _REFIT_ITERATIONS = 8, 3
# Values that points are fitted to, for each point.
_SAMPLES_PER_POINT = 256
_SCALE_ROUNDS = 2
_SWEEPS = 2
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class CodedMatrix:
    """Gate and up, or the even and odd rows of down, as codes.

    Attributes:
        bits: the width of a code.
        codes: uint8 (rows, columns).
        codebook: bfloat16 (2 ** bits, 2), the first point is (0, 0).
        scales: bfloat16 (2, rows).
    """

    bits: int
    codes: torch.Tensor
    codebook: torch.Tensor
    scales: torch.Tensor

    def decoded(self) -> torch.Tensor:
        """The weights as a reader has them, float32 (2, rows, columns)."""
        return decode(self.codes, self.codebook, self.scales)


def code_matrix(weights: torch.Tensor, moments: torch.Tensor, costs: torch.Tensor, bits: int) -> CodedMatrix:
    """Codes a matrix so that its output changes little.

    Minimizes `sum costs[h, r] d[h, r] H d[h, r]^T` over the errors d of every half and row, greedily: columns in
    descending order of their moments, errors pushed into those to come (as GPTQ, arXiv 2210.17323), points fitted anew
    to what was then wanted, once more, and sweeps of coordinate descent.

    Args:
        weights: float32 (2, rows, columns).
        moments: the inputs' second moments H, float32 (columns, columns), or their diagonal (columns,), with which each
            weight gets its nearest point.
        costs: what a unit of squared error in each row's output costs, float32 (2, rows).
        bits: the width of a code.
    """
    if moments.ndim == 1:
        return _code_by_nearest(weights, moments, costs, bits)
    full = Moments.of(moments)
    ordered = weights[:, :, full.order].contiguous()
    matrix = _Fit.start(ordered, full.costs, costs, bits)
    codes, wanted = compensate(ordered, matrix.table, full)
    matrix.fit(wanted, _REFIT_ITERATIONS)
    codes, _ = compensate(ordered, matrix.table, full)
    for _ in range(_SWEEPS):
        codes = descend(codes, ordered, matrix.table, full)
    result = torch.empty_like(codes)
    result[:, full.order] = codes
    return matrix.coded(result)


def _code_by_nearest(weights: torch.Tensor, moments: torch.Tensor, costs: torch.Tensor, bits: int) -> CodedMatrix:
    matrix = _Fit.start(weights, moments / moments.mean().clamp(min=_TINY), costs, bits)
    return matrix.coded(nearest_codes(weights, matrix.table))


class _Fit:
    """Points and scales of a matrix on their way; both are always what bfloat16 can hold.

    Args:
        column_costs: of a unit of squared error in each column, float32 (columns,).
        row_costs: float32 (2, rows).
    """

    def __init__(self, weights: torch.Tensor, column_costs: torch.Tensor, row_costs: torch.Tensor, bits: int) -> None:
        self._bits = bits
        self._weights = weights
        self._column_costs = column_costs
        self._row_costs = row_costs
        self._generator = torch.Generator().manual_seed(bits)
        self._points = universal_points(bits, weights.device)
        total = column_costs.sum().clamp(min=_TINY)
        self._scales = ((weights.square() @ column_costs) / total).sqrt().bfloat16().float()

    @classmethod
    def start(cls, weights: torch.Tensor, column_costs: torch.Tensor, row_costs: torch.Tensor, bits: int) -> _Fit:
        """With points fitted to the weights, and scales to both."""
        fit = cls(weights, column_costs, row_costs, bits)
        fit.fit(weights, _FIT_ITERATIONS)
        for _ in range(_SCALE_ROUNDS):
            fit._fit_scales()
        return fit

    @property
    def table(self) -> Table:
        return Table.of(self._points, self._scales, self._row_costs)

    def fit(self, wanted: torch.Tensor, iterations: int) -> None:
        """Fits the points to a sample of what the weights should become, float32 (2, rows, columns)."""
        _, num_rows, num_columns = wanted.shape
        count = min(num_rows * num_columns, _SAMPLES_PER_POINT << self._bits)
        sample = torch.randint(num_rows * num_columns, (count,), generator=self._generator).to(wanted.device)
        rows = sample // num_columns
        scales = self._scales[:, rows]
        values = wanted.flatten(1)[:, sample] / torch.where(scales > 0, scales, 1)
        costs = self._column_costs[sample % num_columns] * self._row_costs[:, rows] * scales.square()
        costs = costs / costs.mean().clamp(min=_TINY)
        self._points = fit_points(self._points, values.T, costs.T, iterations).bfloat16().float()

    def _fit_scales(self) -> None:
        """The scales by weighted least squares, given each weight's nearest point."""
        codes = nearest_codes(self._weights, self.table)
        points = self._points[codes.int()].permute(2, 0, 1)
        norms = points.square() @ self._column_costs
        fitted = (points * self._weights) @ self._column_costs / norms.clamp(min=_TINY)
        # A scale is a magnitude, and a row whose weights all went to zero keeps its own.
        self._scales = torch.where((norms > 0) & (fitted > 0), fitted, self._scales).bfloat16().float()

    def coded(self, codes: torch.Tensor) -> CodedMatrix:
        return CodedMatrix(self._bits, codes, self._points.bfloat16(), self._scales.bfloat16())
