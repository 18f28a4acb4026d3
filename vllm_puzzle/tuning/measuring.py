"""A configuration's time on the card, and whether what it computes is right."""

import statistics
from collections.abc import Callable
from functools import partial

import torch
from triton.errors import TritonError

from vllm_puzzle.kernels import REFERENCE
from vllm_puzzle.kernels.triton.configs import Config
from vllm_puzzle.kernels.triton.moe import triton_moe

from .card import Card
from .layer import PackedLayer, draw, relative_difference
from .shape import LayerShape

# Calls in one graph, each with a routing of its own: what one reads the next does not find in the L2 cache, and
# launches overlap as they do in a model.
CALLS = 6
ROUNDS = 7
MAX_DIFFERENCE = 1e-2


class WrongResultError(Exception):
    """A configuration computes something else than the reference engine."""


class Measurement:
    """Measures configurations on the card, all with the same tokens and routing."""

    def __init__(self, card: Card, layer: PackedLayer, shape: LayerShape, num_tokens: int, dtype: torch.dtype) -> None:
        self._card = card
        draws = [draw(shape, num_tokens).to(card.device) for _ in range(min(CALLS, card.most_calls))]
        x = torch.randn(num_tokens, shape.hidden_size, device=card.device).to(dtype)
        weights = torch.rand(draws[0].shape, device=card.device)
        self._expected = layer.run(x, weights, draws[-1], REFERENCE)
        tensors = (x, layer.w13, layer.w2, layer.slot_of_expert, weights)
        self._calls: list[Callable[..., torch.Tensor]] = [
            partial(triton_moe, *tensors, ids, "silu", False) for ids in draws
        ]

    def __call__(self, config: Config) -> float | None:
        """Median microseconds of one call; None if it does not compile or lacks resources.

        Raises:
            WrongResultError: it computes something else than the reference engine.
        """
        try:
            replay, outputs = self._card.capture([partial(call, config) for call in self._calls])
        except (TritonError, torch.OutOfMemoryError):
            return None
        except RuntimeError as error:
            # How Triton's passes fail; anything else, such as an illegal access, is a mistake to be seen.
            if "PassManager::run failed" not in str(error):
                raise
            return None
        self._card.times([replay])
        taken = statistics.median(self._card.times([replay] * ROUNDS)) / len(self._calls)
        difference = relative_difference(outputs[-1], self._expected)
        # Written so that NaN is refused as well.
        if not difference <= MAX_DIFFERENCE * (2 if self._card.device.type == "cpu" else 1):
            raise WrongResultError(f"differs from the reference engine by {difference:.3g} relative")
        return taken
