"""Calls of random shapes and routing on the engines that compute on a CPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.cases import Case
from tests.kernels.engines import CPU_DTYPES

SIZES = st.one_of(st.integers(1, 100), st.integers(1, 8).map(lambda blocks: 32 * blocks))


@pytest.mark.heavy
@pytest.mark.parametrize(("engine", "dtype"), CPU_DTYPES)
@settings(max_examples=25)
@given(
    num_tokens=st.one_of(st.integers(0, 20), st.integers(0, 150)),
    num_experts=st.one_of(st.integers(1, 12), st.integers(1, 256)),
    share=st.floats(0, 0.5),
    hidden_size=SIZES,
    intermediate_size=SIZES,
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_random_calls(
    engine: str,
    dtype: torch.dtype,
    num_tokens: int,
    num_experts: int,
    share: float,
    hidden_size: int,
    intermediate_size: int,
    seed: int,
    data: st.DataObject,
) -> None:
    top_k = data.draw(st.integers(1, min(num_experts, 12)))
    pairs = int(share * num_experts)
    case = Case(num_tokens, num_experts, pairs, top_k, hidden_size, intermediate_size, dtype, seed)
    if min(hidden_size, intermediate_size) < 16:
        case.make_positive()
    case.topk_ids[torch.rand(case.topk_ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.1] = -1
    case.check(engine=engine)
