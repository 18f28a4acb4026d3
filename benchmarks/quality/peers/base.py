"""What every method takes and gives, and what several of them need."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from vllm_puzzle.offline.merging.layer import ExpertWeights, RoutedTokens


@dataclass
class CompressedLayer:
    """A layer's experts as they compute after compression.

    `experts` has as many experts as before, of the same shapes, float32 or bfloat16; the members of a merged cluster
    all hold the cluster's weights. The router must never again choose the experts in `dropped`: their logits are to
    become -inf before the softmax and the top-k.
    """

    experts: ExpertWeights
    dropped: frozenset[int] = frozenset()


@dataclass(frozen=True)
class LoggedTokens(RoutedTokens):
    """With what the router said of every expert: `router_logits` is (num_tokens, num_experts), float32."""

    router_logits: torch.Tensor


Method = Callable[[ExpertWeights, LoggedTokens, random.Random], CompressedLayer]


@dataclass(frozen=True)
class Peer:
    """A row of the table.

    `bits` are those per expert weight of the result as it would be stored, `source` is where the method is described.
    A `sequential` method sees what the layers before give after they were compressed, as its authors' code does; the
    others see the uncompressed model.
    """

    name: str
    bits: float
    method: Method
    source: str
    needs_calibration: bool
    sequential: bool = False


def in_float32(experts: ExpertWeights) -> ExpertWeights:
    """New lists of float32 matrices; a matrix that is float32 already is not copied."""
    gate, up, down = ([weight.float() for weight in weights] for weights in (experts.gate, experts.up, experts.down))
    return ExpertWeights(gate, up, down, experts.activation)


def own_tokens(
    experts: ExpertWeights, tokens: RoutedTokens, expert: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The tokens of one expert, in parts of n: router weights (n,) and hidden (n, hidden_size).

    Both float32 on the weights' device; no part is empty, and an expert without tokens has none.
    """
    device = experts.gate[expert].device
    for _, weights, rows in tokens.parts(expert):
        yield weights.to(device, torch.float32), rows.to(device, torch.float32)


def token_counts(tokens: RoutedTokens, num_experts: int) -> list[int]:
    """How many tokens were routed to each expert."""
    counts: list[int] = torch.bincount(tokens.topk_ids.flatten(), minlength=num_experts).tolist()
    return counts


def highest(scores: list[float] | list[int], count: int) -> list[int]:
    """The indices of the `count` highest scores, highest first; of equal ones the lower index is first."""
    return sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:count]


def half(num_experts: int) -> int:
    """How many experts or clusters stay; of an odd number the larger half."""
    return (num_experts + 1) // 2
