"""What the operator's tests let pass: rounding, and nothing more."""

import pytest
import torch

from tests.kernels.cases import TOLERANCE, Case


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("hidden_size", "intermediate_size"), [(1, 1), (1, 2), (2, 1), (3, 3)])
def test_the_smallest_cases_pass_whatever_the_seed(
    dtype: torch.dtype, hidden_size: int, intermediate_size: int
) -> None:
    """Their outputs may be subnormal, where rounding is not relative."""
    for seed in range(200):
        case = Case(1, 1, 0, 1, hidden_size, intermediate_size, dtype, seed)
        case.make_positive()
        case.check()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_wrong_element_does_not_pass(dtype: torch.dtype) -> None:
    case = Case(dtype=dtype)
    got, expected = case.run(), case.expected()
    index = (0, int(expected[0].abs().argmax()))
    got[index] *= 1.1
    with pytest.raises(AssertionError, match="relative error"):
        case.compare(got, expected, TOLERANCE[dtype])


def test_the_allowance_is_a_few_subnormal_spacings() -> None:
    case = Case(1, 1, 0, 1, 1, 1, torch.float16)
    nothing = torch.zeros(1, 1, dtype=torch.float64)
    case.compare(torch.full((1, 1), 2 * 2.0**-24, dtype=torch.float16), nothing, 0.0)
    with pytest.raises(AssertionError, match="relative error"):
        case.compare(torch.full((1, 1), 3 * 2.0**-24, dtype=torch.float16), nothing, 0.0)
