"""Pruning single weights, compared with its definition element by element."""

import torch

from tests.benchmarks.quality.layers import (
    HIDDEN_SIZE,
    MATRICES,
    NUM_EXPERTS,
    NUM_TOKENS,
    compress,
    error,
    random_experts,
    random_tokens,
    route,
)


def wanda_by_element(weight: torch.Tensor, inputs: torch.Tensor) -> list[list[float]]:
    norms = [sum(value * value for value in column) ** 0.5 for column in inputs.T.tolist()]
    rows = []
    for row in weight.tolist():
        order = sorted(range(len(row)), key=lambda column: abs(row[column]) * norms[column])
        dropped = order[: len(row) // 2]
        rows.append([0.0 if column in dropped else value for column, value in enumerate(row)])
    return rows


def test_wanda_keeps_what_its_score_says() -> None:
    experts, tokens = random_experts(), random_tokens(unused=(3,))
    pruned = compress("wanda", experts, tokens).experts
    for expert in range(NUM_EXPERTS):
        own = tokens.hidden[tokens.of(expert)[0]]
        inputs = {"gate": own, "up": own, "down": experts.intermediate(expert, own)}
        for name in MATRICES:
            weight, result = getattr(experts, name)[expert], getattr(pruned, name)[expert]
            # Expert 3 has no tokens, so the largest magnitudes stay.
            by = inputs[name] if len(own) else torch.ones(1, weight.shape[1])
            assert result.tolist() == wanda_by_element(weight, by)
            assert (result == 0).sum(dim=1).tolist() == [weight.shape[1] // 2] * len(weight)


def surgeon(weight: torch.Tensor, inputs: torch.Tensor, blocks: list[range]) -> torch.Tensor:
    """SparseGPT as it is derived: after each column, H restricted to the columns behind it is inverted anew."""
    weight = weight.double().clone()
    hessian = inputs.double().T @ inputs.double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    inverses = {column: hessian[column:, column:].inverse() for block in blocks for column in block}
    for block in blocks:
        scores = torch.stack([weight[:, column] ** 2 / inverses[column][0, 0] for column in block], dim=1)
        dropped = scores <= scores.flatten().sort().values[scores.numel() // 2 - 1]
        for index, column in enumerate(block):
            step = weight[:, column] * dropped[:, index] / inverses[column][0, 0]
            weight[:, column:] -= step[:, None] * inverses[column][0]
    return weight


def test_sparsegpt_is_the_optimal_brain_surgeon_column_by_column() -> None:
    # Two masks, of 128 columns and of 12.
    experts = random_experts(num_experts=2, hidden_size=140, intermediate_size=12)
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(300, 140, generator=generator) @ torch.randn(140, 140, generator=generator)
    tokens = route(hidden, torch.randn(300, 2, generator=generator), top_k=1)
    pruned = compress("sparsegpt", experts, tokens).experts
    blocks = [range(128), range(128, 140)]
    for expert in range(2):
        own = hidden[tokens.of(expert)[0]]
        for name in ("gate", "up"):
            result = getattr(pruned, name)[expert]
            torch.testing.assert_close(
                result.double(), surgeon(getattr(experts, name)[expert], own, blocks), rtol=0, atol=0.01
            )
            assert [(result[:, block] == 0).sum() for block in blocks] == [12 * 64, 12 * 6]
        expected = surgeon(experts.down[expert], pruned.intermediate(expert, own), [range(12)])
        torch.testing.assert_close(pruned.down[expert].double(), expected, rtol=0, atol=0.01)


def test_sparsegpt_loses_less_than_wanda() -> None:
    experts, tokens = random_experts(), random_tokens()
    errors = {slug: error(compress(slug, experts, tokens).experts, experts, tokens) for slug in ("wanda", "sparsegpt")}
    assert 0 < errors["sparsegpt"] < 0.7 * errors["wanda"]


def test_sparsegpt_of_uncorrelated_inputs_keeps_magnitudes() -> None:
    experts = random_experts(num_experts=2)
    orthonormal = torch.linalg.qr(torch.randn(NUM_TOKENS, HIDDEN_SIZE, generator=torch.Generator().manual_seed(5)))[0]
    # All tokens are expert 0's; expert 1 has none.
    tokens = route(orthonormal, torch.tensor([[1.0, 0.0]]).expand(NUM_TOKENS, 2), top_k=1)
    pruned = compress("sparsegpt", experts, tokens).experts
    for name, expert in (("gate", 0), ("up", 0), ("gate", 1), ("up", 1), ("down", 1)):
        weight = getattr(experts, name)[expert]
        largest = weight.abs() > weight.abs().median()
        torch.testing.assert_close(getattr(pruned, name)[expert], weight * largest, rtol=0, atol=1e-4)
