"""Copying packed tensors into a layer's parameters, and counting that each one came exactly once."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..format import FormatError, LayerSlots, packed_name

_SHARDS = ("w1", "w3", "w2")


@dataclass(frozen=True)
class Projection:
    """One of an expert's three matrices in the checkpoint.

    Attributes:
        name: what it is called there, e.g. gate_proj.
        shape: (rows, columns), before it is split among ranks.
    """

    name: str
    shape: tuple[int, int]


class PackedExpertLoader:
    """The `weight_loader` of one layer's packed parameters.

    vLLM calls it with the shard ids w1 (gate), w3 (up) and w2 (down) and the expert id of the tensor's name; it leaves
    out what it cannot place and never asks whether something was missing (vllm/model_executor/layers/fused_moe/
    routed_experts.py, `RoutedExperts.load_weights`). A reload first calls it with parameters on the meta device, only
    to count what it copies.
    """

    # A reload tells its own loaders from others by this.
    __name__ = "packed_expert_loader"

    def __init__(
        self,
        layer_name: str,
        slots: LayerSlots,
        local_slots: list[int],
        projections: dict[str, Projection],
        tp_rank: int,
        tp_size: int,
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        """The parameters may have more rows and columns than this rank's part; those become zero.

        Args:
            layer_name: names the layer's experts, as the prefix of their tensors.
            local_slots: the slots of this rank, in the order of the parameters.
            projections: by shard id.
            failed: called before an error leaves the loader.
        """
        self._layer_name = layer_name
        self._projections = projections
        self._tp_rank = tp_rank
        self._tp_size = tp_size
        self._slots = slots
        self._position = {slots.first_member(slot): index for index, slot in enumerate(local_slots)}
        self._first_members = {slots.first_member(slot) for slot in range(slots.num_slots)}
        self._loaded: set[tuple[int, str]] = set()
        self._failed = failed

    def __call__(
        self,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Copies one matrix, or this rank's part of it; False for a slot of another rank.

        Raises:
            FormatError: a tensor that no slot is named after, came before, or has a wrong dtype or shape.
        """
        try:
            loaded = self._load(param, loaded_weight, shard_id, expert_id)
        except FormatError:
            self._failed()
            raise
        return loaded if return_success else None

    def _load(self, param: torch.nn.Parameter, loaded_weight: torch.Tensor, shard_id: str, expert_id: int) -> bool:
        name = self._name(expert_id, shard_id)
        if expert_id not in self._first_members:
            raise FormatError(f"{name} is unexpected: no slot of this layer is named after expert {expert_id}")
        if expert_id not in self._position:
            return False
        if not param.is_meta and (expert_id, shard_id) in self._loaded:
            raise FormatError(f"{name} is in the checkpoint more than once")
        full_shape = self._projections[shard_id].shape
        if loaded_weight.dtype != param.dtype or tuple(loaded_weight.shape) != full_shape:
            raise FormatError(
                f"{name} is {loaded_weight.dtype} {list(loaded_weight.shape)}, this model needs {param.dtype} "
                f"{list(full_shape)}; convert the source checkpoint again"
            )
        target = param.data[self._position[expert_id]]
        if shard_id != "w2":
            half = target.shape[0] // 2
            target = target.narrow(0, 0 if shard_id == "w1" else half, half)
        split = 1 if shard_id == "w2" else 0
        size = full_shape[split] // self._tp_size
        part = loaded_weight.narrow(split, self._tp_rank * size, size)
        if part.shape != target.shape:
            # On a reload the words lie in the engine's order, and none of them need be zero where padding belongs.
            target.zero_()
        target[: part.shape[0], : part.shape[1]].copy_(part)
        if not param.is_meta:
            self._loaded.add((expert_id, shard_id))
        return True

    def start(self) -> None:
        """Starts a round of loading anew, whatever the last one came to."""
        self._loaded.clear()

    def finish(self) -> None:
        """Ends a round of loading; raises FormatError where something is missing."""
        missing = [
            self._name(expert, shard)
            for expert in self._position
            for shard in _SHARDS
            if (expert, shard) not in self._loaded
        ]
        if missing:
            raise FormatError(
                f"{len(missing)} of {3 * len(self._position)} packed tensors of {self._layer_name} were not in the "
                f"checkpoint: {', '.join(missing[:6])}{', ...' if len(missing) > 6 else ''}"
            )
        self._loaded.clear()

    def _name(self, expert: int, shard_id: str) -> str:
        return packed_name(self._layer_name, expert, self._projections[shard_id].name)
