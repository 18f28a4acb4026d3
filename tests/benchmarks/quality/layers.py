"""Layers and tokens made to suit a method, and what became of the experts of a compressed one."""

import random

import torch
from torch.nn.functional import silu

from benchmarks.quality.peers import PEERS, CompressedLayer, LoggedTokens
from vllm_puzzle.offline.merging.layer import ExpertWeights

NUM_EXPERTS, HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_TOKENS, TOP_K = 8, 24, 16, 200, 2
MATRICES = ("gate", "up", "down")
PAIRS = [(0, 5), (1, 4), (2, 7), (3, 6)]


def random_experts(
    num_experts: int = NUM_EXPERTS, hidden_size: int = HIDDEN_SIZE, intermediate_size: int = INTERMEDIATE_SIZE
) -> ExpertWeights:
    generator = torch.Generator().manual_seed(1)
    gate, up = (
        [torch.randn(intermediate_size, hidden_size, generator=generator) for _ in range(num_experts)] for _ in range(2)
    )
    down = [torch.randn(hidden_size, intermediate_size, generator=generator) for _ in range(num_experts)]
    return ExpertWeights(gate, up, down, silu)


def route(hidden: torch.Tensor, logits: torch.Tensor, top_k: int = TOP_K) -> LoggedTokens:
    weights, ids = logits.softmax(dim=1).topk(top_k)
    return LoggedTokens(hidden, ids, weights, logits)


def random_tokens(unused: tuple[int, ...] = (), num_tokens: int = NUM_TOKENS) -> LoggedTokens:
    """Tokens of few directions and unequal channels; no token goes to the experts in `unused`."""
    generator = torch.Generator().manual_seed(2)
    latent = torch.randn(num_tokens, 6, generator=generator) @ torch.randn(6, HIDDEN_SIZE, generator=generator)
    noise = torch.randn(num_tokens, HIDDEN_SIZE, generator=generator)
    hidden = (latent + 0.3 * noise) * torch.linspace(0.2, 2, HIDDEN_SIZE)
    logits = torch.randn(num_tokens, NUM_EXPERTS, generator=generator) + torch.linspace(1, -1, NUM_EXPERTS)
    logits[:, list(unused)] = -100.0
    return route(hidden, logits)


def paired_experts(noise: float = 1e-4) -> ExpertWeights:
    """Of each pair in PAIRS the second is the first but for `noise`."""
    experts = random_experts()
    generator = torch.Generator().manual_seed(3)
    for first, second in PAIRS:
        for name in MATRICES:
            weights = getattr(experts, name)
            weights[second] = weights[first] + noise * torch.randn(weights[first].shape, generator=generator)
    return experts


def compress(slug: str, experts: ExpertWeights, tokens: LoggedTokens) -> CompressedLayer:
    return PEERS[slug].method(experts, tokens, random.Random(0))


def clusters(experts: ExpertWeights) -> list[tuple[int, ...]]:
    """The experts that hold equal weights, by lowest member."""
    found: dict[int, list[int]] = {}
    for expert in range(experts.num_experts):
        alike = (
            other
            for other in found
            if all(torch.equal(getattr(experts, name)[expert], getattr(experts, name)[other]) for name in MATRICES)
        )
        found.setdefault(next(alike, expert), []).append(expert)
    return [tuple(members) for members in found.values()]


def error(compressed: ExpertWeights, experts: ExpertWeights, tokens: LoggedTokens) -> float:
    """Of the layer's output, relative."""
    expected = tokens.through(experts)
    return ((tokens.through(compressed) - expected).norm() / expected.norm()).item()
