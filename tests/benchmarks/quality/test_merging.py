"""Merging experts into clusters: which of them, and into what."""

import itertools
import random

import pytest
import torch

from benchmarks.quality.peers import PEERS
from tests.benchmarks.quality.layers import (
    INTERMEDIATE_SIZE,
    MATRICES,
    NUM_EXPERTS,
    NUM_TOKENS,
    PAIRS,
    clusters,
    compress,
    error,
    paired_experts,
    random_experts,
    random_tokens,
    route,
)


@pytest.mark.parametrize("slug", ["hc-smoe", "sub-moe"])
def test_experts_that_compute_the_same_are_merged_by_frequency(slug: str) -> None:
    # Nobody uses the pair of 1 and 4, and of 2 and 7 only one is used.
    experts, tokens = paired_experts(), random_tokens(unused=(1, 4, 7))
    merged = compress(slug, experts, tokens).experts
    assert clusters(merged) == PAIRS
    assert 0 < error(merged, experts, tokens) < 1e-3
    for first, second in PAIRS:
        counts = [len(tokens.of(expert)[0]) for expert in (first, second)]
        share = counts[0] / sum(counts) if sum(counts) else 0.5
        for name in MATRICES:
            weights = getattr(experts, name)
            expected = weights[first] * share + weights[second] * (1 - share)
            torch.testing.assert_close(getattr(merged, name)[first], expected, rtol=0, atol=1e-5)


def test_only_cosines_ignore_how_large_an_output_is() -> None:
    experts = paired_experts()
    for _, second in PAIRS:
        experts.down[second] = 5 * experts.down[second]
    assert clusters(compress("sub-moe", experts, random_tokens()).experts) == PAIRS
    assert clusters(compress("hc-smoe", experts, random_tokens()).experts) != PAIRS


def test_hc_smoe_links_by_average() -> None:
    # Mean outputs on a line. 2 and 3 join, then 1; from these on average 4 is nearer than 0 (4.43 and 4.67), but 0 is
    # nearer than 4 by the nearest (3 and 3.1) and by the farthest (6 and 6.1).
    experts = random_experts(num_experts=6)
    for expert, position in enumerate([0, 3, 5, 6, 9.1, 14]):
        experts.gate[expert], experts.up[expert] = experts.gate[0], experts.up[0]
        experts.down[expert] = experts.down[5] * position
    tokens = route(random_tokens().hidden, torch.randn(NUM_TOKENS, 6, generator=torch.Generator().manual_seed(7)))
    assert clusters(compress("hc-smoe", experts, tokens).experts) == [(0,), (1, 2, 3, 4), (5,)]


def test_sub_moe_finds_the_clusters_with_the_least_scatter() -> None:
    # Three of one kind and three of another, unlike enough that a bad start ends in a bad place.
    experts, tokens = random_experts(num_experts=6), random_tokens()
    for expert, noise in ((1, 1.4), (2, 1.1), (4, 0.3), (5, 1.1)):
        for name in MATRICES:
            weights = getattr(experts, name)
            weights[expert] = weights[expert // 3 * 3] + noise * weights[expert]
    tokens = route(tokens.hidden, torch.randn(NUM_TOKENS, 6, generator=torch.Generator().manual_seed(7)))
    outputs = torch.stack([experts.output(expert, tokens.hidden) for expert in range(6)])
    directions = outputs / outputs.norm(dim=2, keepdim=True)

    def scatter(labels: tuple[int, ...]) -> float:
        kinds = [directions[[expert for expert in range(6) if labels[expert] == label]] for label in set(labels)]
        return sum((kind - kind.mean(dim=0)).square().sum().item() for kind in kinds)

    best = min(itertools.product(range(3), repeat=6), key=scatter)
    found = clusters(compress("sub-moe", experts, tokens).experts)
    assert found == sorted(tuple(e for e in range(6) if best[e] == label) for label in set(best))


def test_the_seed_alone_decides_where_sub_moe_starts() -> None:
    experts = random_experts(num_experts=24)
    tokens = route(random_tokens().hidden, torch.randn(NUM_TOKENS, 24, generator=torch.Generator().manual_seed(8)))
    runs = [clusters(PEERS["sub-moe"].method(experts, tokens, random.Random(seed)).experts) for seed in (0, 0, 0, 0, 1)]
    assert runs[0] == runs[1] == runs[2] == runs[3] != runs[4]


@pytest.mark.parametrize("telling", MATRICES)
def test_m_smoe_undoes_a_permutation_of_neurons(telling: str) -> None:
    experts = random_experts()
    generator = torch.Generator().manual_seed(6)
    # Neurons differ in one of the three matrices only.
    for name in set(MATRICES) - {telling}:
        for weight in getattr(experts, name):
            weight[:] = weight[:, :1] if name == "down" else weight[:1]
    logits = torch.randn(NUM_TOKENS, NUM_EXPERTS, generator=generator)
    for first, second in PAIRS:
        order = torch.randperm(INTERMEDIATE_SIZE, generator=generator)
        experts.gate[second], experts.up[second] = experts.gate[first][order], experts.up[first][order]
        experts.down[second] = experts.down[first][:, order]
        logits[:, second] = logits[:, first] - 0.7
    tokens = route(random_tokens().hidden, logits)
    # Both of a pair are used, the first more than any second.
    counts = [len(tokens.of(expert)[0]) for expert in range(NUM_EXPERTS)]
    assert min(counts[first] for first, _ in PAIRS) > max(counts[second] for _, second in PAIRS) > 10
    merged = compress("m-smoe", experts, tokens).experts
    assert clusters(merged) == PAIRS
    for name in MATRICES:
        for first, _ in PAIRS:
            torch.testing.assert_close(getattr(merged, name)[first], getattr(experts, name)[first])
    assert error(merged, experts, tokens) < 1e-5


def test_m_smoe_compares_weights_where_the_router_says_nothing() -> None:
    # All experts are used alike, so that the lower half is dominant.
    pairs = [(0, 6), (1, 4), (2, 7), (3, 5)]
    experts = random_experts()
    for first, second in pairs:
        for name in MATRICES:
            getattr(experts, name)[second] = getattr(experts, name)[first] + 1e-4
    tokens = route(random_tokens().hidden, torch.zeros(NUM_TOKENS, NUM_EXPERTS), top_k=NUM_EXPERTS)
    merged = compress("m-smoe", experts, tokens).experts
    assert clusters(merged) == pairs
    for first, second in pairs:
        torch.testing.assert_close(merged.gate[first], (experts.gate[first] + experts.gate[second]) / 2)
