"""What a layer's output lacks, and the part that down projections can give back.

The layers before it were merged too, so a layer's experts see other inputs than in the source model, and the residual
stream has drifted. Each pair, once its gate and up are merged, is asked for the output that its experts had before
and a share of what the layer's output lacks; what the pair then fails to give is left to the pairs after it.
"""

import math
from dataclasses import dataclass

import torch

from .layer import ExpertWeights, RoutedTokens
from .saliency import ExpertStatistics

# The share of what is lacking that each expert is asked for; several experts see the same token.
_SHARE = 0.25
# How many times what a regression on noise would explain counts as chance.
_CHANCE = 1.25
# The most that an expert gives of what is lacking, of the square of what it gives itself; a hundredth is usual.
_MOST = 0.1
# Relative to the diagonal: keeps a down projection near its own weights where tokens are few or inputs alike.
_RIDGE = 0.1


class OutputCorrection:
    """Follows what the layer's output lacks while its pairs are merged, one after the other.

    Args:
        experts: the layer's own weights.
        routed: what enters them after the merged layers before.
        lacking: the source model's output of this layer less that of `experts` on `routed`, and less everything
            around them, float32 (num_tokens, hidden_size); changed in place.
    """

    def __init__(self, experts: ExpertWeights, routed: RoutedTokens, lacking: torch.Tensor) -> None:
        self._experts = experts
        self._routed = routed
        self._lacking = lacking
        # What each expert's output loses with its gate and up, part by part, from `ask` until `settle`.
        self._lost: dict[int, list[torch.Tensor]] = {}

    def ask(
        self, expert: int, merged: ExpertWeights, member: int, statistics: ExpertStatistics
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the expert's down projection should be once its gate and up are those of `merged`.

        Args:
            merged: gate and up of the pair; `member` is the expert's place in it.
            statistics: the expert's, with moments between inputs.

        Returns:
            The projection by ridge regression, float32 (hidden_size, intermediate_size), and the second moments of
            what it will read, float32 (intermediate_size, intermediate_size).
        """
        down = self._experts.down[expert].float()
        moment = torch.zeros_like(statistics.intermediate)
        lost, lacking = _Wanted(torch.zeros_like(down)), _Wanted(torch.zeros_like(down))
        count, produced = 0, 0.0
        self._lost[expert] = []
        for tokens, weights, rows in self._routed.parts(expert):
            before = self._experts.intermediate(expert, rows).float()
            after = merged.intermediate(member, rows).float()
            change = (before - after).to(rows.dtype) @ down.to(rows.dtype).T
            self._lost[expert].append(change)
            w = weights[:, None]
            wanted, part, read = change * w, _SHARE * self._lacking[tokens], after * w
            moment += read.T @ read
            lost.add(wanted, read)
            lacking.add(part, read)
            count += len(tokens)
            produced += float(((before * w) @ down.T).square().sum())
        own, share = moment, len(moment) / (len(moment) + count)
        moment = (1 - share) * own + share * statistics.intermediate
        diagonal = moment.diagonal()
        # Above zero for an expert whose weights are all zero.
        least = (1e-3 * diagonal.mean()).clamp(min=1e-20)
        ridge = moment + torch.diag(_RIDGE * diagonal + least)
        made_up, back = lost.met(ridge, own), lacking.met(ridge, own)
        given, most = _energy(back, own), _MOST * produced
        shortening = 1.0 if given <= most else math.sqrt(most / given)
        trust = lacking.trust(back, given, count) * shortening
        return down + made_up + trust * back, moment

    def settle(self, expert: int, merged: ExpertWeights, member: int) -> None:
        """Counts the output of the merged expert, after `ask`, in place of the expert's own."""
        change = merged.down[member].float() - self._experts.down[expert].float()
        for (tokens, weights, rows), lost in zip(self._routed.parts(expert), self._lost.pop(expert), strict=True):
            gained = merged.intermediate(member, rows) @ change.to(rows.dtype).T
            self._lacking.index_add_(0, tokens, (lost.float() - gained.float()) * weights[:, None])


@dataclass
class _Wanted:
    """What a change of a down projection should add to the output of an expert: sums over the expert's tokens.

    `cross` is with what the projection reads, float32 (hidden_size, intermediate_size), `energy` the squared norm.
    """

    cross: torch.Tensor
    energy: float = 0.0

    def add(self, wanted: torch.Tensor, read: torch.Tensor) -> None:
        """Adds tokens: float32 (num_tokens, hidden_size) and (num_tokens, intermediate_size)."""
        self.cross += wanted.T @ read
        self.energy += float(wanted.square().sum())

    def met(self, ridge: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
        """The change by ridge regression, shortened to what helps most where it gives more than is wanted.

        The regression divides by a moment that is mostly not the expert's own where its tokens are few, and can then
        overshoot by as many times as there are inputs.

        Args:
            ridge: what to divide by, float32 (intermediate_size, intermediate_size).
            moment: the sum over the expert's tokens of what the projection reads with itself.
        """
        change = torch.linalg.solve(ridge, self.cross.T).T
        given = _energy(change, moment)
        return change if given <= self.energy else change * (float((change * self.cross).sum()) / given)

    def trust(self, change: torch.Tensor, given: float, count: int) -> float:
        """How much of a change is more than chance, 0 to 1.

        Regression on d inputs explains about d / (d + n) of what n tokens want even where that has nothing to do with
        the inputs: see the adjusted R^2. The error of another expert that is far louder than this one is of that kind.

        Args:
            change: by regression, float32 (hidden_size, intermediate_size); its length does not matter.
            given: its `_energy`.
            count: how many tokens these are.
        """
        met = float((change * self.cross).sum())
        if given <= 0 or met <= 0:
            return 0.0
        explained = met**2 / given
        inputs = self.cross.shape[1]
        chance = _CHANCE * inputs / (inputs + count)
        return max(0.0, 1 - chance * max(0.0, self.energy - explained) / explained)


def _energy(change: torch.Tensor, moment: torch.Tensor) -> float:
    """The squared norm, over tokens with this moment, of what a change of a down projection gives."""
    return float(((change @ moment) * change).sum())
