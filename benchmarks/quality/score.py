"""How far a compressed model is from the uncompressed one, on text that calibration never saw."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import kl_div, nll_loss

from benchmarks.quality.model import Choices, QualityModel

_WINDOWS_AT_ONCE = 16


@dataclass(frozen=True)
class Score:
    """`perplexity` of the text; mean `kl_divergence` in nats and `top1_agreement` against the uncompressed model.

    `kl_with_source_routing` is the divergence where every router chooses as in the uncompressed model, and gives the
    same weights: what the experts themselves lose, without what other choices add. None where experts are dropped.
    """

    perplexity: float
    kl_divergence: float
    top1_agreement: float
    kl_with_source_routing: float | None


class Scorer:
    """Scores windows of a text that share no context; the first token of each is given, not predicted.

    Args:
        windows: token ids, int64 (num_windows, sequence_length).
        model: holds the uncompressed experts at this moment.
    """

    def __init__(self, model: QualityModel, windows: torch.Tensor) -> None:
        self._model = model
        self._windows = windows
        self._choices: list[list[Choices]] = []
        # A float for every predicted token and entry of the vocabulary: gigabytes, for half of the time of a score.
        self._reference = list(self._log_probabilities(keep=True))

    @torch.inference_mode()
    def _log_probabilities(self, keep: bool = False, hold: bool = False) -> Iterator[torch.Tensor]:
        """The log probabilities of every window, float32 (sequence_length - 1, vocabulary).

        The routers' choices are to be kept, or held as they were kept.
        """
        for index, part in enumerate(self._windows.split(_WINDOWS_AT_ONCE)):
            self._model.hold_choices(self._choices[index] if hold else None)
            states = self._model.causal.model(part, use_cache=False)[0]
            self._model.hold_choices(None)
            if keep:
                self._choices.append(self._model.choices())
            for hidden in states:
                yield self._model.causal.lm_head(hidden[:-1]).float().log_softmax(-1)

    @torch.inference_mode()
    def score(self) -> Score:
        """The score of the experts that the model holds at this moment."""
        negative_log_likelihood = divergence = agreed = 0.0
        for window, got, wanted in zip(self._windows, self._log_probabilities(), self._reference, strict=True):
            negative_log_likelihood += nll_loss(got, window[1:], reduction="sum").item()
            divergence += kl_div(got, wanted, reduction="sum", log_target=True).item()
            agreed += (got.argmax(-1) == wanted.argmax(-1)).sum().item()
        predicted = self._windows.numel() - len(self._windows)
        divergence /= predicted
        perplexity = math.exp(negative_log_likelihood / predicted)
        return Score(perplexity, divergence, agreed / predicted, self._kl_with_source_routing(divergence))

    def _kl_with_source_routing(self, free: float) -> float | None:
        if self._model.drops_experts:
            return None
        if self._model.config.num_experts_per_tok == self._model.shape.num_experts:
            return free
        pairs = zip(self._log_probabilities(hold=True), self._reference, strict=True)
        total = sum(kl_div(got, wanted, reduction="sum", log_target=True).item() for got, wanted in pairs)
        return total / (self._windows.numel() - len(self._windows))


def continue_greedily(model: QualityModel, prompts: torch.Tensor, length: int) -> torch.Tensor:
    """The tokens that follow `prompts` (num_prompts, prompt_length) greedily: int64 (num_prompts, length).

    Every pass is of all positions at once, as in `tokens_until_divergence`: the same weights then make the same choices
    to the bit, which they do not token by token, where products are summed in another order.
    """
    tokens = torch.zeros(len(prompts), length, dtype=prompts.dtype)
    # Each pass settles one more position: what is chosen there depends on the positions before alone.
    for _ in range(length):
        tokens = _choices(model, prompts, tokens)
    return tokens


def tokens_until_divergence(model: QualityModel, prompts: torch.Tensor, wanted: torch.Tensor) -> list[int]:
    """How many tokens of each row the model would continue with as `wanted`, before its first other choice.

    Until then its greedy continuation is `wanted` itself, so one pass over that gives every choice that counts.

    Args:
        wanted: the uncompressed model's greedy continuation of `prompts`, as `continue_greedily` gives it.
    """
    return [int(row.cumprod(0).sum()) for row in (_choices(model, prompts, wanted) == wanted).int()]


@torch.inference_mode()
def _choices(model: QualityModel, prompts: torch.Tensor, continuation: torch.Tensor) -> torch.Tensor:
    """The likeliest token at every position of `continuation`, given those before it."""
    hidden = model.causal.model(torch.cat([prompts, continuation[:, :-1]], dim=1), use_cache=False)[0]
    chosen: torch.Tensor = model.causal.lm_head(hidden[:, prompts.shape[1] - 1 :]).argmax(-1)
    return chosen
