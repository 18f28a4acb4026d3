"""Unstructured pruning: half of the weights of every expert become zero."""

import random
from collections.abc import Iterable

import torch

from vllm_puzzle.offline.merging.compensation import inverse_factor
from vllm_puzzle.offline.merging.layer import ExpertWeights, RoutedTokens

from .base import CompressedLayer, in_float32, own_tokens

# As in SparseGPT's experiments: the columns of a mask, and what is added to H's diagonal as a share of its mean.
_BLOCK_SIZE = 128
_DAMPING = 0.01


def wanda(experts: ExpertWeights, tokens: RoutedTokens, _: random.Random) -> CompressedLayer:
    """Wanda, section 3 (arXiv 2306.11695): of every output row stay the weights with the highest `|W| * ||X||_2`.

    X are the expert's own tokens, for the down projection what the unpruned gate and up make of them: Wanda records
    the inputs of a whole block before it prunes any of it. Without tokens magnitudes decide alone.
    """
    pruned = in_float32(experts)
    for expert in range(pruned.num_experts):
        gate, up, down = pruned.gate[expert], pruned.up[expert], pruned.down[expert]
        hidden = _norms(gate, (rows for _, rows in own_tokens(pruned, tokens, expert)))
        intermediate = _norms(
            down, (pruned.intermediate(expert, rows) for _, rows in own_tokens(pruned, tokens, expert))
        )
        pruned.gate[expert] = _prune_rows(gate, hidden)
        pruned.up[expert] = _prune_rows(up, hidden)
        pruned.down[expert] = _prune_rows(down, intermediate)
    return CompressedLayer(pruned)


def _norms(weight: torch.Tensor, parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """The L2 norm of each input channel of `weight`, (columns,), over parts (n, columns); ones if all are zero."""
    squares = weight.new_zeros(weight.shape[1])
    for inputs in parts:
        squares += inputs.square().sum(dim=0)
    return squares.sqrt() if squares.any() else torch.ones_like(squares)


def _prune_rows(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    saliency = weight.abs() * norms
    lowest = saliency.argsort(dim=1, stable=True)[:, : weight.shape[1] // 2]
    return weight.scatter(1, lowest, 0.0)


def sparsegpt(experts: ExpertWeights, tokens: RoutedTokens, _: random.Random) -> CompressedLayer:
    """SparseGPT, algorithm 1 (arXiv 2301.00774), with `H = X X^T` of the expert's own tokens.

    A mask spans all rows of 128 columns, so rows differ in how much they keep. The down projection sees what the
    pruned gate and up make of the tokens. Without tokens H is the identity, which is pruning by magnitude.
    """
    pruned = in_float32(experts)
    for expert in range(pruned.num_experts):
        gate, up, down = pruned.gate[expert], pruned.up[expert], pruned.down[expert]
        factor = _inverse_factor(gate, (rows for _, rows in own_tokens(pruned, tokens, expert)))
        pruned.gate[expert] = _prune_columns(gate, factor)
        pruned.up[expert] = _prune_columns(up, factor)
        factor = _inverse_factor(
            down, (pruned.intermediate(expert, rows) for _, rows in own_tokens(pruned, tokens, expert))
        )
        pruned.down[expert] = _prune_columns(down, factor)
    return CompressedLayer(pruned)


def _inverse_factor(weight: torch.Tensor, parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """The `inverse_factor` of the damped H, (columns, columns), from parts (n, columns)."""
    columns = weight.shape[1]
    hessian = weight.new_zeros(columns, columns)
    for inputs in parts:
        hessian += inputs.T @ inputs
    damping = _DAMPING * hessian.diagonal().mean()
    hessian.diagonal().add_(damping if damping > 0 else 1.0)
    return inverse_factor(hessian)


def _prune_columns(weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    weight = weight.clone()
    columns = weight.shape[1]
    for start in range(0, columns, _BLOCK_SIZE):
        stop = min(start + _BLOCK_SIZE, columns)
        block, within = weight[:, start:stop], factor[start:stop, start:stop]
        saliency = (block / within.diagonal()).square().flatten()
        lowest = torch.zeros_like(saliency, dtype=torch.bool)
        lowest[saliency.argsort(stable=True)[: len(saliency) // 2]] = True
        lowest = lowest.view_as(block)
        errors = torch.zeros_like(block)
        for column in range(stop - start):
            errors[:, column] = block[:, column] * lowest[:, column] / within[column, column]
            block[:, column:] -= errors[:, column, None] * within[column, column:]
        # Their errors took them to zero but for rounding.
        block[lowest] = 0.0
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return weight
