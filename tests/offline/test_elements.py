"""Sharing or leaving out, element by element, compared with every choice written out."""

from math import copysign

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_puzzle.offline.merging.elements import cheapest, cheapest_loss

# BF16 values of both signs, zeros, equal and nearly equal magnitudes among them.
elements = st.sampled_from([0.0, -0.0, 0.5, -0.5, 0.25, 0.21875, -1.0, 0.4296875, 3.0, -0.0625, 2.0**-15])
costs = st.sampled_from([0.0, 1e-12, 0.125, 0.5, 1.0, 3.0, 1e9])


def loss_of(new: tuple[float, float], old: tuple[float, float], c0: float, c1: float) -> float:
    return c0 * (new[0] - old[0]) ** 2 + c1 * (new[1] - old[1]) ** 2


def every_choice(w0: float, w1: float, c0: float, c1: float) -> list[float]:
    """The losses of keeping one and of sharing: the best magnitude and a hundred others between the two."""
    a, b = abs(w0), abs(w1)
    best = (c0 * a + c1 * b) / (c0 + c1) if c0 + c1 else a
    shared = [best, *(a + (b - a) * step / 100 for step in range(101))]
    return [loss_of((a, 0.0), (a, b), c0, c1), loss_of((0.0, b), (a, b), c0, c1)] + [
        loss_of((magnitude, magnitude), (a, b), c0, c1) for magnitude in shared
    ]


@given(elements, elements, costs, costs)
def test_no_choice_is_cheaper(w0: float, w1: float, c0: float, c1: float) -> None:
    weights = torch.tensor([w0, w1]).reshape(2, 1, 1)
    merged = cheapest(weights.abs(), torch.tensor([c0, c1]).reshape(2, 1, 1)).signed(weights)
    new = merged.flatten().tolist()
    got = loss_of((new[0], new[1]), (w0, w1), c0, c1)
    # In float32 what two members share is not exactly the best.
    slack = 1e-12 * max(c0, c1) * max(abs(w0), abs(w1)) ** 2
    assert got <= min(every_choice(w0, w1, c0, c1)) * (1 + 1e-5) + slack
    answered = cheapest_loss(*weights.abs(), torch.tensor(c0), torch.tensor(c1)).item()
    assert answered == pytest.approx(got, rel=1e-5, abs=slack)
    assert new[0] == 0 or new[1] == 0 or abs(new[0]) == abs(new[1])
    assert all(value == 0 or copysign(1, value) == copysign(1, old) for value, old in zip(new, (w0, w1), strict=True))


def test_costs_of_columns_and_rows_stand_for_every_element() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 7, 5, generator=generator)
    rows, columns = torch.rand(2, 7, 1, generator=generator), torch.rand(2, 1, 5, generator=generator)
    whole = cheapest(weights.abs(), rows * columns).signed(weights)
    for row in range(7):
        for column in range(5):
            pair, costs_of_pair = weights[:, row, column, None, None], rows[:, row] * columns[:, :, column]
            alone = cheapest(pair.abs(), costs_of_pair[..., None]).signed(pair)
            assert torch.equal(alone.flatten(), whole[:, row, column])
    by_column, by_element = (cheapest(weights.abs(), each) for each in (columns, columns.expand_as(weights)))
    assert torch.equal(by_column.signed(weights), by_element.signed(weights))
    first, second = weights.abs()
    loss = cheapest_loss(first, second, *(rows * columns))
    torch.testing.assert_close(loss, (rows * columns * (whole - weights).square()).sum(dim=0))
