"""Column by column: compared with the definition, and with deciding every element by itself."""

import pytest
import torch

from vllm_puzzle.offline.merging.compensation import compensate_columns
from vllm_puzzle.offline.merging.elements import cheapest

DAMPING = 0.01


def problem(
    num_rows: int, num_columns: int, num_tokens: int = 400, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, second moments of correlated inputs, and what each row's output counts."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(2, num_rows, num_columns, generator=generator)
    latent = torch.randn(2, num_tokens, 5, generator=generator) @ torch.randn(2, 5, num_columns, generator=generator)
    inputs = latent + 0.3 * torch.randn(2, num_tokens, num_columns, generator=generator)
    return weights, inputs.mT @ inputs, torch.rand(2, num_rows, generator=generator) + 0.1


def output_error(merged: torch.Tensor, weights: torch.Tensor, moments: torch.Tensor, rows: torch.Tensor) -> float:
    error = (merged - weights).double()
    return float((rows.double()[..., None] * (error @ moments.double()) * error).sum())


def test_on_correlated_inputs_the_output_changes_far_less_than_without_compensation() -> None:
    for seed in range(3):
        weights, moments, rows = problem(16, 48, seed=seed)
        alone = cheapest(weights.abs(), rows[..., None] * moments.diagonal(dim1=1, dim2=2)[:, None]).signed(weights)
        compensated = output_error(compensate_columns(weights, moments, rows), weights, moments, rows)
        assert compensated < 0.5 * output_error(alone, weights, moments, rows)


def test_inputs_without_correlation_leave_nothing_to_compensate() -> None:
    weights, _, rows = problem(9, 8)
    energies = torch.tensor([[1.0, 1, 1, 1, 4, 4, 4, 16], [4.0, 16, 1, 4, 1, 1, 4, 1]])
    damped = energies + DAMPING * energies.mean(dim=1, keepdim=True)
    expected = cheapest(weights.abs(), rows[..., None] * damped[:, None]).signed(weights).bfloat16().float()
    merged = compensate_columns(weights, torch.diag_embed(energies), rows)
    assert torch.equal(merged != 0, expected != 0)
    # Float32 may round to the neighbour.
    torch.testing.assert_close(merged, expected, rtol=2**-7, atol=0)


def compensate_slowly(weights: torch.Tensor, moments: torch.Tensor, rows: torch.Tensor) -> list[list[list[float]]]:
    """The definition, in float64 and one element at a time: decide a column, then move the remaining columns to where
    the output, the decided columns fixed, changes least."""
    members, num_columns = range(2), weights.shape[2]
    means = [moments[m].double().diagonal().mean() for m in members]
    damped = [moments[m].double() + DAMPING * means[m] * torch.eye(num_columns).double() for m in members]
    importance = sum(moments[m].double().diagonal() / means[m] for m in members)
    order = sorted(range(num_columns), key=lambda column: -float(importance[column]))
    remaining = weights.double().clone()
    result = torch.zeros_like(remaining)
    for step, column in enumerate(order):
        left = order[step:]
        inverses = [torch.linalg.inv(damped[m][left][:, left]) for m in members]
        for row in range(weights.shape[1]):
            w0, w1 = (float(remaining[m, row, column]) for m in members)
            c0, c1 = (float(rows[m, row] / inverses[m][0, 0]) for m in members)
            shared = (c0 * abs(w0) + c1 * abs(w1)) / (c0 + c1)
            choices = [(shared, shared), (abs(w0), 0.0), (0.0, abs(w1))]
            best = min(choices, key=lambda new: c0 * (new[0] - abs(w0)) ** 2 + c1 * (new[1] - abs(w1)) ** 2)
            for m, old, magnitude in zip(members, (w0, w1), best, strict=True):
                new = torch.copysign(torch.tensor(magnitude).bfloat16().double(), torch.tensor(old))
                result[m, row, column] = new
                error = (old - new) / inverses[m][0, 0]
                remaining[m, row, left[1:]] -= error * inverses[m][0, 1:]
    return result.tolist()


@pytest.mark.parametrize(("num_rows", "num_columns"), [(5, 9), (2, 66)], ids=["one block", "two blocks"])
def test_it_is_the_definition_with_every_remaining_matrix_inverted_anew(num_rows: int, num_columns: int) -> None:
    weights, moments, rows = problem(num_rows, num_columns)
    # The two members weigh their columns differently, so their common order is neither's own.
    scale = torch.stack([torch.linspace(0.3, 2, num_columns), torch.linspace(1.5, 0.5, num_columns)])
    moments = moments * scale[:, None] * scale[:, :, None]
    expected = torch.tensor(compensate_slowly(weights, moments, rows))
    merged = compensate_columns(weights, moments, rows)
    assert torch.equal(merged != 0, expected != 0)
    # Float32 may round to the neighbour.
    torch.testing.assert_close(merged, expected, rtol=2**-7, atol=0)
    assert (merged == expected).float().mean() > 0.9


def test_more_columns_than_a_block_are_compensated_across_it() -> None:
    weights, moments, rows = problem(8, 150)
    alone = cheapest(weights.abs(), rows[..., None] * moments.diagonal(dim1=1, dim2=2)[:, None]).signed(weights)
    compensated = output_error(compensate_columns(weights, moments, rows), weights, moments, rows)
    assert compensated < 0.25 * output_error(alone, weights, moments, rows)


def test_every_pair_of_elements_has_one_magnitude_or_a_zero_that_bfloat16_holds() -> None:
    weights, moments, rows = problem(12, 70)
    merged = compensate_columns(weights, moments, rows)
    first, second = merged.abs()
    assert bool(((first == second) | (first == 0) | (second == 0)).all())
    assert bool(((first != 0) | (second != 0)).all())
    assert torch.equal(merged, merged.bfloat16().float())
    assert bool((first == second).any())
    assert bool((first == 0).any())
    assert bool((second == 0).any())


def test_a_member_whose_inputs_are_all_zero_leaves_everything_to_its_mate() -> None:
    weights, moments, rows = problem(4, 10)
    moments[0] = 0
    merged = compensate_columns(weights, moments, rows)
    assert bool(merged.isfinite().all())
    alone = compensate_columns(torch.stack([torch.zeros_like(weights[1]), weights[1]]), moments, rows)
    assert torch.equal(merged[1].abs(), alone[1].abs())
