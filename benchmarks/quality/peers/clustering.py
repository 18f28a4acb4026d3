"""Which experts are alike by what they compute: their outputs on every calibration token, routed to them or not."""

import random
from collections.abc import Iterator

import torch
from scipy.cluster.hierarchy import cut_tree, linkage

from vllm_puzzle.offline.merging.layer import ExpertWeights, RoutedTokens

# Bounds the outputs of all experts that are in memory at once.
_ELEMENTS_AT_ONCE = 1 << 24
_STARTS = 10
_MOST_ITERATIONS = 100


def cluster_by_mean_output(experts: ExpertWeights, tokens: RoutedTokens, num_clusters: int) -> list[int]:
    """Each expert's cluster by average linkage of the Euclidean distances between mean outputs."""
    total = torch.zeros(experts.num_experts, tokens.hidden.shape[1], dtype=torch.float64)
    for outputs in _every_output(experts, tokens):
        total += outputs.sum(dim=1).cpu()
    tree = linkage((total / len(tokens)).numpy(), method="average", metric="euclidean")
    # Exactly as many as asked for, also where distances are equal, which `fcluster` does not promise.
    labels: list[int] = cut_tree(tree, n_clusters=num_clusters)[:, 0].tolist()
    return labels


def cluster_by_cosine(
    experts: ExpertWeights, tokens: RoutedTokens, num_clusters: int, generator: random.Random
) -> list[int]:
    """Each expert's cluster by K-means, the similarity of two being the mean cosine of their outputs over tokens.

    That is K-means of the normalized outputs. Vectors of as many numbers as there are experts, with the same inner
    products, replace them. The best of ten starts counts.
    """
    similarity = torch.zeros(experts.num_experts, experts.num_experts, dtype=torch.float64)
    for outputs in _every_output(experts, tokens):
        normalized = torch.nn.functional.normalize(outputs, dim=2).flatten(1)
        similarity += (normalized @ normalized.T).cpu() / len(tokens)
    values, vectors = torch.linalg.eigh(similarity)
    points = vectors * values.clamp(min=0).sqrt()
    runs = [_k_means(points, _distant_points(points, num_clusters, generator)) for _ in range(_STARTS)]
    return min(runs, key=lambda run: run[1])[0]


def _every_output(experts: ExpertWeights, tokens: RoutedTokens) -> Iterator[torch.Tensor]:
    """The outputs of all experts for consecutive blocks of n tokens, float32 (num_experts, n, hidden_size)."""
    device = experts.gate[0].device
    for block in tokens.hidden.split(max(1, _ELEMENTS_AT_ONCE // (experts.num_experts * tokens.hidden.shape[1]))):
        hidden = block.to(device, torch.float32)
        yield torch.stack([experts.output(expert, hidden) for expert in range(experts.num_experts)])


def _distant_points(points: torch.Tensor, count: int, generator: random.Random) -> torch.Tensor:
    """Starting centers by k-means++: each drawn by its squared distance to the nearest drawn before it."""
    chosen = [generator.randrange(len(points))]
    while len(chosen) < count:
        squared = torch.cdist(points, points[chosen]).amin(dim=1).square()
        # Where every point is equal to one that is drawn, any will do.
        chosen += generator.choices(range(len(points)), (squared + 1e-30).tolist())
    return points[chosen]


def _k_means(points: torch.Tensor, centers: torch.Tensor) -> tuple[list[int], float]:
    """Lloyd's iterations: each point's cluster, and the sum of squared distances. An empty cluster stays empty."""
    for _ in range(_MOST_ITERATIONS):
        distances, labels = torch.cdist(points, centers).min(dim=1)
        previous, centers = centers, centers.clone()
        for label in labels.unique():
            centers[label] = points[labels == label].mean(dim=0)
        if torch.equal(centers, previous):
            break
    return labels.tolist(), distances.square().sum().item()
