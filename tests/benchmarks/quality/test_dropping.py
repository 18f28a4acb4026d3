"""Dropping whole experts: which of them go."""

import torch

from benchmarks.quality.peers import LoggedTokens
from tests.benchmarks.quality.layers import (
    HIDDEN_SIZE,
    NUM_EXPERTS,
    NUM_TOKENS,
    TOP_K,
    compress,
    error,
    random_experts,
    random_tokens,
)

NO_LOGITS = torch.zeros(0, NUM_EXPERTS)


def test_reap_drops_the_least_mean_of_weighted_output_norms() -> None:
    experts, tokens = random_experts(), random_tokens(unused=(2,))
    # Rarely used but loud, and often used but faint: frequency and saliency disagree.
    experts.down[7] *= 10
    experts.down[0] *= 0.01
    sums, counts = [0.0] * NUM_EXPERTS, [0] * NUM_EXPERTS
    for token in range(NUM_TOKENS):
        for choice in range(TOP_K):
            expert = int(tokens.topk_ids[token, choice])
            norm = experts.output(expert, tokens.hidden[token : token + 1]).norm().item()
            sums[expert] += tokens.topk_weights[token, choice].item() * norm
            counts[expert] += 1
    means = [total / max(count, 1) for total, count in zip(sums, counts, strict=True)]
    result = compress("reap", experts, tokens)
    assert result.dropped == set(sorted(range(NUM_EXPERTS), key=lambda expert: means[expert])[:4])
    assert {0, 2} <= result.dropped
    assert 7 not in result.dropped
    assert error(result.experts, experts, tokens) == 0


def test_frequency_drops_the_least_used_and_of_equals_the_higher_id() -> None:
    experts = random_experts()
    chosen = [0] * 3 + [1] * 1 + [2] * 5 + [3] * 2 + [4] * 2 + [5] * 2 + [7] * 9
    ids = torch.tensor(chosen).reshape(-1, 2)
    tokens = LoggedTokens(torch.randn(len(ids), HIDDEN_SIZE), ids, torch.full(ids.shape, 0.5), NO_LOGITS)
    # 7, 2 and 0 stay, and of 3, 4 and 5 with two tokens each the lowest.
    assert compress("frequency", experts, tokens).dropped == {1, 4, 5, 6}
    silent = LoggedTokens(torch.zeros(len(ids), HIDDEN_SIZE), ids, torch.full(ids.shape, 0.5), NO_LOGITS)
    assert compress("reap", experts, silent).dropped == {4, 5, 6, 7}
