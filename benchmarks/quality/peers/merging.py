"""Expert merging: clusters of experts, half as many as there were experts, each share one expert's weights.

The papers spread the clusters over a model's layers, HC-SMoE excepted; here every layer has as many. The router stays
as it was: tokens for any member of a cluster go to what it became.
"""

import random
from collections.abc import Callable

import torch
from scipy.optimize import linear_sum_assignment

from vllm_puzzle.offline.merging.layer import ExpertWeights, RoutedTokens

from .base import CompressedLayer, LoggedTokens, half, highest, in_float32, token_counts
from .clustering import cluster_by_cosine, cluster_by_mean_output

# Matrices of one shape and their shares, which sum to 1, to one matrix of that shape.
_Combine = Callable[[list[torch.Tensor], list[float]], torch.Tensor]


def hc_smoe(experts: ExpertWeights, tokens: RoutedTokens, _: random.Random) -> CompressedLayer:
    """HC-SMoE, section 3 (arXiv 2410.08589): hierarchical clustering of mean outputs, then a weighted average.

    Average linkage and weights by frequency are what the paper's main results use.
    """
    experts = in_float32(experts)
    labels = cluster_by_mean_output(experts, tokens, half(experts.num_experts))
    return _merge_clusters(experts, labels, token_counts(tokens, experts.num_experts), _average)


def m_smoe(experts: ExpertWeights, tokens: LoggedTokens, _: random.Random) -> CompressedLayer:
    """M-SMoE, section 3.1 (arXiv 2310.01334): the less used experts join the more used one with the nearest logits.

    Before the average by frequency a member's neurons are put in the order of its dominant expert's; the paper aligns
    all experts to one order. Where the router's logits are all equal they say nothing, and the cosine of all of two
    experts' weights, neurons as they come, takes their place.

    Raises:
        ValueError: the router's logits were not recorded.
    """
    counts = token_counts(tokens, experts.num_experts)
    dominant = highest(counts, half(experts.num_experts))
    experts = in_float32(experts)
    aligned = in_float32(experts)
    logits = tokens.router_logits
    features = _flattened(experts) if logits.min() == logits.max() else list(logits.T)
    labels = list(range(experts.num_experts))
    for expert in sorted(set(labels) - set(dominant)):
        cosines = [torch.cosine_similarity(features[expert], features[other], dim=0).item() for other in dominant]
        labels[expert] = dominant[highest(cosines, 1)[0]]
        order = _matching_neurons(experts, labels[expert], expert)
        aligned.gate[expert] = experts.gate[expert][order]
        aligned.up[expert] = experts.up[expert][order]
        aligned.down[expert] = experts.down[expert][:, order]
    return _merge_clusters(aligned, labels, counts, _average)


def _flattened(experts: ExpertWeights) -> list[torch.Tensor]:
    matrices = zip(experts.gate, experts.up, experts.down, strict=True)
    return [torch.cat([weight.flatten() for weight in weights]) for weights in matrices]


def _matching_neurons(experts: ExpertWeights, target: int, expert: int) -> torch.Tensor:
    """For each neuron of `target` the one of `expert` in its place, int64 (intermediate_size,).

    Of all permutations the one with the greatest inner product of the two experts' weights.
    """
    products = (
        experts.gate[target] @ experts.gate[expert].T
        + experts.up[target] @ experts.up[expert].T
        + experts.down[target].T @ experts.down[expert]
    )
    _, order = linear_sum_assignment(products.cpu().numpy(), maximize=True)
    return torch.from_numpy(order).to(products.device)


def sub_moe(experts: ExpertWeights, tokens: RoutedTokens, generator: random.Random) -> CompressedLayer:
    """Sub-MoE, sections 3.2 and 3.3 (arXiv 2506.23266): K-means of outputs by cosine, then a merge in a shared basis.

    The paper says that it concatenates the matrices vertically, but the shapes it gives with equation 5, U of O rows
    and V^T of n * I columns for W of (O, I), are those of matrices side by side, `[W1 W2 ...]`; that is done here.
    """
    experts = in_float32(experts)
    labels = cluster_by_cosine(experts, tokens, half(experts.num_experts), generator)
    return _merge_clusters(experts, labels, token_counts(tokens, experts.num_experts), _union_decomposition)


def _union_decomposition(weights: list[torch.Tensor], shares: list[float]) -> torch.Tensor:
    """`U S sum(share * V^T)` of the SVD `U S [V1^T V2^T ...] = [W1 W2 ...]`, equations 5 to 8.

    As nothing is truncated, `U S V_i^T` is `W_i` and this is the average by shares, up to rounding.
    """
    u, s, vt = torch.linalg.svd(torch.cat(weights, dim=1), full_matrices=False)
    return (u * s) @ _average(list(vt.split(weights[0].shape[1], dim=1)), shares)


def _average(weights: list[torch.Tensor], shares: list[float]) -> torch.Tensor:
    total = torch.zeros_like(weights[0])
    for weight, share in zip(weights, shares, strict=True):
        total += weight * share
    return total


def _merge_clusters(experts: ExpertWeights, labels: list[int], counts: list[int], combine: _Combine) -> CompressedLayer:
    """Puts into the lists of `experts`, for every expert, what its cluster's members combine to.

    A member's share is that of its tokens among the cluster's; members of a cluster without tokens have equal shares.
    """
    for label in sorted(set(labels)):
        members = [expert for expert, other in enumerate(labels) if other == label]
        if len(members) == 1:
            continue
        total = sum(counts[member] for member in members)
        shares = [counts[member] / total if total else 1 / len(members) for member in members]
        for weights in (experts.gate, experts.up, experts.down):
            combined = combine([weights[member] for member in members], shares)
            for member in members:
                weights[member] = combined
    return CompressedLayer(experts)
