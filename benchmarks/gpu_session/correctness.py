"""Every default configuration against the reference engine, wherever a mistake could hide."""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gpu_session.workload import DTYPES, Cut, Workload, pairs
from vllm_puzzle.format import LayerSlots, pack
from vllm_puzzle.kernels.reference import reference_moe
from vllm_puzzle.kernels.triton.configs import Config
from vllm_puzzle.kernels.triton.moe import triton_moe
from vllm_puzzle.tuning.card import Card
from vllm_puzzle.tuning.layer import PackedLayer, draw, relative_difference
from vllm_puzzle.tuning.shape import LayerShape

Say = Callable[..., None]
Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3}
# Triton's interpreter cuts bfloat16 off where a GPU rounds it.
INTERPRETED = 2


class CheckedLayer:
    """A layer of pairs and singles in a random order, and calls of it with ids of -1, whose router weights are NaN."""

    def __init__(self, shape: LayerShape, device: torch.device) -> None:
        self._shape, self._device = shape, device
        self._generator = torch.Generator().manual_seed(0)
        order = torch.randperm(shape.num_experts, generator=self._generator).tolist()
        slots = LayerSlots(layer=0, experts=order, pairs=pairs(shape))
        inner, hidden = shape.intermediate_size, shape.hidden_size
        self._tensors = (
            self._words(slots.num_slots, 2 * inner, hidden),
            self._words(slots.num_slots, hidden, inner),
            slots.slot_of_expert().to(device),
        )

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self._generator)

    def _words(self, *shape: int) -> torch.Tensor:
        masks, signs = ([self._random(*shape) < share for _ in range(2)] for share in (0.75, 0.5))
        return pack(self._random(*shape) * 0.2, masks, signs).to(self._device)

    def call(self, num_tokens: int, dtype: str) -> Arguments:
        """The first six arguments of `packed_moe`."""
        x = torch.randn(num_tokens, self._shape.hidden_size, generator=self._generator).to(getattr(torch, dtype))
        ids = self._random(num_tokens, self._shape.num_experts).topk(self._shape.top_k).indices.int()
        weights = self._random(num_tokens, self._shape.top_k)
        nobody = self._random(num_tokens, self._shape.top_k) < 0.1
        ids[nobody], weights[nobody] = -1, float("nan")
        return x.to(self._device), *self._tensors, weights.to(self._device), ids.to(self._device)


def poison(card: Card) -> None:
    """Memory that is handed out next holds NaN, so that what is read before it is written shows."""
    if card.device.type == "cuda":
        sizes = [1 << size for size in range(10, 28)]
        held = [torch.full((size // 4,), float("nan"), device=card.device) for size in sizes for _ in range(3)]
        del held


def check_all(card: Card, workload: Workload, say: Say, engine: Callable[..., torch.Tensor] = triton_moe) -> None:
    """Says of every shape, dtype, configuration and number of tokens whether it is right."""
    from vllm_puzzle.tuning.gpu import gpu_of

    family = gpu_of(card.device).family
    for shape in workload.checked:
        layer = CheckedLayer(shape, card.device)
        for dtype in workload.dtypes(shape):
            for cut in workload.cuts(family, shape):
                for num_tokens in workload.checked_tokens:
                    _check(card, shape, layer.call(num_tokens, dtype), dtype, cut, engine, say)


def _check(
    card: Card,
    shape: LayerShape,
    arguments: Arguments,
    dtype: str,
    cut: Cut,
    engine: Callable[..., torch.Tensor],
    say: Say,
) -> None:
    expected = reference_moe(*arguments, "silu", False)
    config = Config.model_validate(cut.config)
    poison(card)
    output, again = (engine(*arguments, "silu", False, config) for _ in range(2))
    # Bits, since NaN is equal to nothing.
    same = {"repeats": torch.equal(output.view(torch.int16), again.view(torch.int16))}
    if dtype == DTYPES[0]:
        wide = engine(*arguments[:-1], arguments[-1].long(), "silu", False, config)
        same["int64_ids"] = torch.equal(output.view(torch.int16), wide.view(torch.int16))
    difference = relative_difference(output, expected)
    tolerance = TOLERANCE[dtype] * (INTERPRETED if card.device.type == "cpu" else 1)
    say(
        what="correct",
        shape=shape.name,
        tokens=len(output),
        dtype=dtype,
        key=cut.key,
        split_k=cut.split_k,
        difference=float(f"{difference:.3g}"),
        **same,
        ok=bool(difference <= tolerance) and all(same.values()),
    )


def run_watched(card: Card, shapes: tuple[LayerShape, ...], all_tokens: tuple[int, ...], say: Say) -> None:
    """A few calls for tools that watch every instruction, or a single kernel."""
    for shape in shapes:
        layer = PackedLayer(shape, card.device)
        for num_tokens in all_tokens:
            x = torch.randn(num_tokens, shape.hidden_size, dtype=torch.bfloat16, device=card.device)
            ids = draw(shape, num_tokens)
            ids[:: max(2, num_tokens // 2)] = -1
            run = partial(layer.run, x, torch.rand(ids.shape, device=card.device), ids.to(card.device))
            finite = bool(torch.isfinite(run()).all())
            run()
            card.synchronize()
            say(what="watched", shape=shape.name, tokens=num_tokens, ok=finite)
