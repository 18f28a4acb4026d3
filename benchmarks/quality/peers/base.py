"""What every method takes and gives, and what several of them need."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from vllm_puzzle.offline.merging.layer import ExpertWeights, RoutedTokens
from vllm_puzzle.offline.merging.saliency import ExpertStatistics, measure_saliency


@dataclass
class CompressedLayer:
    """A layer's experts as they compute after compression.

    `experts` has as many experts as before, of the same shapes, float32 or bfloat16; the members of a merged cluster
    all hold the cluster's weights. The router must never again choose the experts in `dropped`: their logits are to
    become -inf before the softmax and the top-k. `bits` are those per expert weight as they would be stored, everything
    counted, where the method's do not follow from its peer alone.
    """

    experts: ExpertWeights
    dropped: frozenset[int] = frozenset()
    bits: float | None = None


@dataclass(frozen=True)
class LoggedTokens(RoutedTokens):
    """With what the router said of every expert: `router_logits` is (num_tokens, num_experts), float32.

    `energy` is what a squared error of the layer's output, summed over tokens, is compared with across layers.
    """

    router_logits: torch.Tensor
    energy: float = 1.0
    _statistics: dict[int, ExpertStatistics] = field(default_factory=dict)

    def statistics(self, experts: ExpertWeights, expert: int) -> ExpertStatistics:
        """What these tokens say of one of the layer's uncompressed experts, with moments between inputs.

        It is measured once for all methods.
        """
        if expert not in self._statistics:
            self._statistics[expert] = measure_saliency(experts, expert, self, full=True)
        return self._statistics[expert]

    def output_error(self, experts: ExpertWeights, expert: int, matrices: Sequence[torch.Tensor]) -> float:
        """The squared error that gate, up and down in place of an expert's own are expected to leave in the output.

        It is `rows * dW H dW^T`: second order, each matrix by itself, over the tokens and with their router weights.
        """
        known = self.statistics(experts, expert)
        rows = (known.gate_rows, known.up_rows, torch.ones(()))
        moments = (known.hidden, known.hidden, known.intermediate)
        return sum(
            float(_quadratic(wanted.float() - got.float(), moment, cost))
            for wanted, got, moment, cost in zip(experts.matrices(expert), matrices, moments, rows, strict=True)
        )

    def relative_output_error(self, experts: ExpertWeights, compressed: ExpertWeights) -> float:
        """The layer's `output_error` over its energy, the sum of what each expert's output has by the same moments."""
        error = energy = 0.0
        for expert in range(experts.num_experts):
            error += self.output_error(experts, expert, compressed.matrices(expert))
            moment = self.statistics(experts, expert).intermediate
            energy += float(_quadratic(experts.down[expert].float(), moment, torch.ones(())))
        return error / energy


def _quadratic(change: torch.Tensor, moment: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return (((change @ moment) * change).sum(dim=1) * rows).sum()


Method = Callable[[ExpertWeights, LoggedTokens, random.Random], CompressedLayer]


@dataclass(frozen=True)
class Peer:
    """A row of the table.

    `bits` are those per expert weight of the result as it would be stored, None where each layer says it; `source` is
    where the method is described.
    A `sequential` method sees what the layers before give after they were compressed, as its authors' code does; the
    others see the uncompressed model.
    """

    name: str
    bits: float | None
    method: Method
    source: str
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
