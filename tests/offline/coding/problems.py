"""Matrices to be coded, with correlated inputs."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import vllm_puzzle.offline.coding.compiled
from vllm_puzzle.offline.coding.compiled import LIBRARY_PATH


def problem(num_rows: int, num_columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, second moments of correlated inputs, and what each row's output counts."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(2, num_rows, num_columns, generator=generator) * 0.03
    latent = torch.randn(400, 5, generator=generator) @ torch.randn(5, num_columns, generator=generator)
    inputs = latent + torch.randn(400, num_columns, generator=generator)
    return weights, inputs.T @ inputs, torch.rand(2, num_rows, generator=generator) + 0.1


def output_error(decoded: torch.Tensor, weights: torch.Tensor, moments: torch.Tensor, costs: torch.Tensor) -> float:
    """Of what a matrix became: the squared error of its output, in float64."""
    error = (decoded - weights).double()
    read = error * moments.double() if moments.ndim == 1 else error @ moments.double()
    return float((costs.double()[..., None] * read * error).sum())


@contextmanager
def in_torch() -> Iterator[None]:
    """As where nothing was compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_puzzle.offline.coding.compiled, "LIBRARY_PATH", LIBRARY_PATH.with_name("nowhere.so"))
        yield
