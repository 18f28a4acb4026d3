"""Coding one matrix: scales of its rows, points for its weights, then codes that change its output least."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from vllm_puzzle.format import decode

from .columns import Descent, Moments, compensate, nearest_codes
from .points import fit_points, universal_points
from .table import Table

_FIT_ITERATIONS, _REFIT_ITERATIONS = 8, 3
_SCALE_ROUNDS = 2
_SWEEPS = 3
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
        return decode(self.codes, self.codebook, self.scales).contiguous()


def code_matrix(weights: torch.Tensor, moments: torch.Tensor, costs: torch.Tensor, bits: int) -> CodedMatrix:
    """Codes a matrix so that its output changes little.

    Minimizes `sum costs[h, r] d[h, r] H d[h, r]^T` over the errors d of every half and row, greedily: columns in
    descending order of their moments, errors pushed into those to come (as GPTQ, arXiv 2210.17323), and once more with
    points fitted to what was wanted of each column; then sweeps of coordinate descent, and scales by least squares.

    Args:
        weights: float32 (2, rows, columns).
        moments: the inputs' second moments H, float32 (columns, columns), or their diagonal (columns,), with which each
            weight gets its nearest point.
        costs: what a unit of squared error in each row's output costs, float32 (2, rows).
        bits: the width of a code.
    """
    # Squares of what is very large or small would leave float32; a power of two changes no decision.
    unit = _unit(weights)
    coded = _code(weights / unit, moments, costs / _unit(costs), bits)
    return replace(coded, scales=coded.scales * unit)


def _unit(values: torch.Tensor) -> float:
    """The power of two next above the largest magnitude, 1 where all are zero or one is not finite."""
    largest = float(values.abs().max())
    # The inverse is to be a float32 number too.
    return 2.0 ** max(-126, min(126, math.frexp(largest)[1])) if 0 < largest < math.inf else 1.0


def _code(weights: torch.Tensor, moments: torch.Tensor, costs: torch.Tensor, bits: int) -> CodedMatrix:
    """`code_matrix`, of weights and costs around 1."""
    if moments.ndim == 1:
        return _code_by_nearest(weights, moments, costs, bits)
    full = Moments.of(moments)
    ordered = weights[:, :, full.order].contiguous()
    matrix = _Fit.start(ordered, full.costs, costs, bits)
    _, wanted = compensate(ordered, matrix.table, full)
    matrix.fit_points(wanted, _REFIT_ITERATIONS)
    codes, _ = compensate(ordered, matrix.table, full)
    descent = Descent(codes, ordered, matrix.table, full)
    for _ in range(_SWEEPS):
        descent.sweep(matrix.table)
        descent.rescale(matrix.fit_scales(descent.decoded, descent.read))
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
        self._points = universal_points(bits, weights.device)
        total = column_costs.sum().clamp(min=_TINY)
        self._scales = ((weights.square() @ column_costs) / total).sqrt().bfloat16().float()

    @classmethod
    def start(cls, weights: torch.Tensor, column_costs: torch.Tensor, row_costs: torch.Tensor, bits: int) -> _Fit:
        """With points fitted to the weights, and scales to both."""
        fit = cls(weights, column_costs, row_costs, bits)
        fit.fit_points(weights, _FIT_ITERATIONS)
        for _ in range(_SCALE_ROUNDS):
            decoded = fit.table.decoded(nearest_codes(weights, fit.table))
            fit.fit_scales(decoded, decoded * column_costs)
        return fit

    @property
    def table(self) -> Table:
        return Table.of(self._points, self._scales, self._row_costs)

    def fit_points(self, wanted: torch.Tensor, iterations: int) -> None:
        """Fits the points to what the weights should become, float32 (2, rows, columns)."""
        points = fit_points(self._points, wanted, self._scales, self._column_costs, self._row_costs, iterations)
        self._points = points.bfloat16().float()

    def fit_scales(self, decoded: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """The scales by least squares, given what codes stand for, and that times the moments of what they read.

        Returns:
            The ratios of the new scales to the old ones, float32 (2, rows).
        """
        norms = (read * decoded).sum(dim=2)
        ratios = (read * self._weights).sum(dim=2) / norms.clamp(min=_TINY)
        # A scale is a magnitude, and a row whose weights all went to zero keeps its own.
        fitted = torch.where((norms > 0) & (ratios > 0), self._scales * ratios, self._scales).bfloat16().float()
        ratios = torch.where(self._scales > 0, fitted / self._scales, 1)
        self._scales = fitted
        return ratios

    def coded(self, codes: torch.Tensor) -> CodedMatrix:
        return CodedMatrix(self._bits, codes, self._points.bfloat16(), self._scales.bfloat16())
