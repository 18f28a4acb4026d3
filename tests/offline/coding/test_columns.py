"""Codes column by column: compared with the definition, and the compiled loops with torch."""

from pathlib import Path

import pytest
import torch

from tests.offline.coding.problems import in_torch, output_error, problem
from vllm_puzzle.format import CODE_BITS
from vllm_puzzle.kernels.cpu.build import build_coding
from vllm_puzzle.offline.coding.columns import Descent, Moments, compensate, nearest_codes
from vllm_puzzle.offline.coding.compiled import LIBRARY_PATH, is_compiled
from vllm_puzzle.offline.coding.points import universal_points
from vllm_puzzle.offline.coding.table import Table

DAMPING = 0.01
SHAPES = [(1, 1), (3, 64), (7, 65), (5, 150)]


def table_of(weights: torch.Tensor, costs: torch.Tensor, bits: int) -> Table:
    return Table.of(universal_points(bits), weights.square().mean(dim=2).sqrt(), costs)


def nearest_by_definition(wanted: torch.Tensor, table: Table, costs: torch.Tensor) -> int:
    """Of one row: `wanted` and `costs` are of both halves, `table` has one row."""
    return int(((wanted.double()[:, None] - table.values[:, 0].double()).square() * costs[:, None]).sum(dim=0).argmin())


@pytest.mark.parametrize("bits", CODE_BITS)
def test_each_weight_gets_the_nearest_point(bits: int) -> None:
    weights, _, costs = problem(4, 33)
    costs[0, 1] = 50
    table = table_of(weights, costs, bits)
    codes = nearest_codes(weights, table)
    assert codes.dtype == torch.uint8
    errors = (weights[..., None] - table.values[:, :, None]).double().square() * costs[..., None, None]
    by_code = errors.sum(dim=0)
    chosen = by_code.gather(2, codes.long()[..., None])[..., 0]
    torch.testing.assert_close(chosen, by_code.amin(dim=2), rtol=1e-4, atol=1e-12)


def compensate_slowly(weights: torch.Tensor, moments: torch.Tensor, table: Table, costs: torch.Tensor) -> torch.Tensor:
    """The definition, in float64: decide a column, then move the remaining columns to where the output, the decided
    columns fixed, changes least. Columns are in descending order of their moments."""
    num_columns = weights.shape[2]
    damped = moments.double() + DAMPING * moments.double().diagonal().mean() * torch.eye(num_columns).double()
    remaining = weights.double().clone()
    codes = torch.empty(weights.shape[1:], dtype=torch.uint8)
    for k in range(num_columns):
        inverse = torch.linalg.inv(damped[k:, k:])
        for row in range(weights.shape[1]):
            of_row = Table(table.values[:, row : row + 1], table.slopes[:, row : row + 1], table.offsets[row : row + 1])
            codes[row, k] = code = nearest_by_definition(remaining[:, row, k], of_row, costs[:, row])
            error = (remaining[:, row, k] - table.values[:, row, code].double()) / inverse[0, 0]
            remaining[:, row, k + 1 :] -= error[:, None] * inverse[0, 1:]
    return codes


@pytest.mark.parametrize(("num_rows", "num_columns"), [(4, 9), (2, 66)], ids=["one block", "two blocks"])
def test_it_is_the_definition_with_every_remaining_matrix_inverted_anew(num_rows: int, num_columns: int) -> None:
    weights, moments, costs = problem(num_rows, num_columns)
    scale = torch.linspace(2, 0.5, num_columns)
    full = Moments.of(moments * scale * scale[:, None])
    table = table_of(weights, costs, 4)
    ordered = weights[:, :, full.order].contiguous()
    moments_in_order = (moments * scale * scale[:, None])[full.order][:, full.order]
    codes, wanted = compensate(ordered, table, full)
    assert torch.equal(codes, compensate_slowly(ordered, moments_in_order, table, costs))
    # What was wanted of the last column is what its error is counted from.
    assert torch.equal(nearest_codes(wanted, table), codes)


def test_descent_ends_where_no_code_alone_can_be_better() -> None:
    weights, moments, costs = problem(6, 70)
    full = Moments.of(moments)
    ordered = weights[:, :, full.order].contiguous()
    table = table_of(weights, costs, 5)
    descent = Descent(nearest_codes(ordered, table), ordered, table, full)

    def error(codes: torch.Tensor) -> float:
        return output_error(table.decoded(codes), ordered, full.damped, costs)

    errors = [error(descent.codes)]
    for _ in range(12):
        descent.sweep(table)
        errors.append(error(descent.codes))
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.7 * errors[0]
    torch.testing.assert_close(descent.read, table.decoded(descent.codes) @ full.damped, rtol=1e-3, atol=1e-4)
    least = error(descent.codes)
    for row, column in [(0, 0), (3, 31), (5, 69)]:
        for code in range(32):
            other = descent.codes.clone()
            other[row, column] = code
            assert error(other) > least * (1 - 1e-6)


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize(("num_rows", "num_columns"), SHAPES)
def test_the_compiled_loops_and_torch_agree_bit_for_bit(bits: int, num_rows: int, num_columns: int) -> None:
    assert is_compiled()
    weights, moments, costs = problem(num_rows, num_columns, seed=bits)
    full = Moments.of(moments)
    table = table_of(weights, costs, bits)

    def run() -> list[torch.Tensor]:
        codes, wanted = compensate(weights, table, full)
        descent = Descent(codes.clone(), weights, table, full)
        descent.sweep(table)
        return [nearest_codes(weights, table), codes, wanted, descent.codes, descent.decoded, descent.read]

    made = run()
    with in_torch():
        expected = run()
    for mine, torchs in zip(made, expected, strict=True):
        assert torch.equal(mine, torchs)


def test_codes_do_not_depend_on_the_number_of_threads() -> None:
    weights, moments, costs = problem(40, 70)
    table, full = table_of(weights, costs, 6), Moments.of(moments)
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            results.append(compensate(weights, table, full)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.heavy
def test_the_loops_compile_without_a_warning(tmp_path: Path) -> None:
    build_coding(LIBRARY_PATH.with_name("coding.cpp"), tmp_path / "coding.so", ["-Wall", "-Wextra", "-Werror"])
    assert (tmp_path / "coding.so").exists()
