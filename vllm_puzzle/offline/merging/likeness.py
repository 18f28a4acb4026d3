"""How alike two experts are, as functions."""

from collections.abc import Sequence

import torch

from .layer import Activation, ExpertWeights

_NUM_INPUTS = 2048


def measure_likeness(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor], activation: Activation) -> float:
    """The cosine between the outputs of two experts on random inputs.

    Args:
        first, second: gate, up and down of each.

    Returns:
        1 where the first one's output is all zeros, which has no direction.
    """
    inputs = torch.randn(_NUM_INPUTS, first[0].shape[1], generator=torch.Generator().manual_seed(0))
    wanted, found = (_output(matrices, inputs, activation).flatten() for matrices in (first, second))
    return torch.cosine_similarity(wanted, found, dim=0).item() if wanted.any() else 1.0


def _output(matrices: Sequence[torch.Tensor], inputs: torch.Tensor, activation: Activation) -> torch.Tensor:
    gate, up, down = ([matrix] for matrix in matrices)
    return ExpertWeights(gate, up, down, activation).output(0, inputs)
