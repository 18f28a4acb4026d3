"""Copying expert tensors into a layer's parameters, and counting that each one came exactly once."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ..format import PACKED_SUFFIX, ExpertTensor, FormatError, LayerSlots


@dataclass(frozen=True)
class Projection:
    """One of an expert's three matrices in the checkpoint.

    Attributes:
        name: what it is called there, e.g. gate_proj.
        shape: (rows, columns) of its weights, before it is split among ranks.
    """

    name: str
    shape: tuple[int, int]


@dataclass(frozen=True)
class Rank:
    """Which part of every expert a tensor-parallel rank holds."""

    index: int = 0
    count: int = 1

    def part(self, size: int) -> slice:
        """This rank's rows or columns of `size`, which the ranks share evenly."""
        share = size // self.count
        return slice(self.index * share, (self.index + 1) * share)


class ExpertLoader(ABC):
    """The `weight_loader` of a layer's parameters that hold one kind of tensor.

    vLLM calls it with the shard ids w1 (gate), w3 (up) and w2 (down) and the expert id of the tensor's name; it leaves
    out what it cannot place and never asks whether something was missing (vllm/model_executor/layers/fused_moe/
    routed_experts.py, `RoutedExperts.load_weights`). A reload first calls it with parameters on the meta device, only
    to count what it copies.
    """

    # A reload tells its own loaders from others by this.
    __name__ = "expert_loader"

    shards: tuple[str, ...] = ("w1", "w3", "w2")
    """The projections that have such a tensor, in the order of an expert's."""

    def __init__(
        self,
        layer_name: str,
        suffix: str,
        projections: dict[str, Projection],
        local_experts: Iterable[int],
        failed: Callable[[], None],
    ) -> None:
        """A layer's tensors `<layer_name>.<expert>.<projection>.<suffix>`.

        Args:
            projections: by shard id.
            local_experts: the ids that this rank's tensors are named after.
            failed: called before an error leaves the loader.
        """
        self._layer_name = layer_name
        self._suffix = suffix
        self._projections = projections
        self._local_experts = list(local_experts)
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
        """Copies one tensor, or this rank's part of it; False for one of another rank.

        Raises:
            FormatError: a tensor that the layer does not have, came before, or has a wrong dtype or shape.
        """
        try:
            loaded = self._load(param, loaded_weight, shard_id, expert_id)
        except FormatError:
            self._failed()
            raise
        return loaded if return_success else None

    def _load(self, param: torch.nn.Parameter, loaded_weight: torch.Tensor, shard_id: str, expert_id: int) -> bool:
        reason = self._why_not(expert_id, shard_id)
        if reason is not None:
            raise FormatError(f"{self._name(expert_id, shard_id)} is unexpected: {reason}")
        if expert_id not in self._local_experts:
            return False
        if not param.is_meta and (expert_id, shard_id) in self._loaded:
            raise FormatError(f"{self._name(expert_id, shard_id)} is in the checkpoint more than once")
        dtype, shape = self._expected(expert_id, shard_id)
        if loaded_weight.dtype != dtype or tuple(loaded_weight.shape) != shape:
            raise FormatError(
                f"{self._name(expert_id, shard_id)} is {loaded_weight.dtype} {list(loaded_weight.shape)}, this model "
                f"needs {dtype} {list(shape)}; convert the source checkpoint again"
            )
        self._place(param, loaded_weight, shard_id, expert_id)
        if not param.is_meta:
            self._loaded.add((expert_id, shard_id))
        return True

    def start(self) -> None:
        """Starts a round of loading anew, whatever the last one came to."""
        self._loaded.clear()

    def finish(self) -> None:
        """Ends a round of loading; raises FormatError where something is missing."""
        expected = [(expert, shard) for expert in self._local_experts for shard in self.shards]
        missing = [self._name(*tensor) for tensor in expected if tensor not in self._loaded]
        if missing:
            raise FormatError(
                f"{len(missing)} of {len(expected)} packed tensors of {self._layer_name} were not in the "
                f"checkpoint: {', '.join(missing[:6])}{', ...' if len(missing) > 6 else ''}"
            )
        self._loaded.clear()

    @abstractmethod
    def _why_not(self, expert: int, shard_id: str) -> str | None:
        """Why the layer has no such tensor, None where it has, on this rank or another."""

    @abstractmethod
    def _expected(self, expert: int, shard_id: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """The dtype and the shape that the tensor has in the checkpoint."""

    @abstractmethod
    def _place(self, param: torch.nn.Parameter, tensor: torch.Tensor, shard_id: str, expert: int) -> None:
        """Copies this rank's part. What it does not cover of a parameter becomes zero."""

    def _name(self, expert: int, shard_id: str) -> str:
        return ExpertTensor(self._layer_name, expert, self._projections[shard_id].name, self._suffix).name


class PackedExpertLoader(ExpertLoader):
    """Loads the slots of a layer of packed pairs, whose words are int16."""

    def __init__(
        self,
        layer_name: str,
        slots: LayerSlots,
        local_slots: list[int],
        projections: dict[str, Projection],
        rank: Rank,
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        """The parameters may have more rows and columns than this rank's part; those become zero.

        Args:
            layer_name: names the layer's experts, as the prefix of their tensors.
            local_slots: the slots of this rank, in the order of the parameters.
            projections: by shard id.
            failed: called before an error leaves the loader.
        """
        self._position = {slots.first_member(slot): index for index, slot in enumerate(local_slots)}
        super().__init__(layer_name, PACKED_SUFFIX, projections, self._position, failed)
        self._rank = rank
        self._first_members = {slots.first_member(slot) for slot in range(slots.num_slots)}

    def _why_not(self, expert: int, shard_id: str) -> str | None:
        return None if expert in self._first_members else f"no slot of this layer is named after expert {expert}"

    def _expected(self, expert: int, shard_id: str) -> tuple[torch.dtype, tuple[int, ...]]:
        return torch.int16, self._projections[shard_id].shape

    def _place(self, param: torch.nn.Parameter, tensor: torch.Tensor, shard_id: str, expert: int) -> None:
        target = param.data[self._position[expert]]
        if shard_id == "w2":
            part = tensor[:, self._rank.part(tensor.shape[1])]
        else:
            half = target.shape[0] // 2
            target = target.narrow(0, 0 if shard_id == "w1" else half, half)
            part = tensor[self._rank.part(tensor.shape[0])]
        fill(target, part)


def fill(target: torch.Tensor, part: torch.Tensor) -> None:
    """Copies a matrix into the upper left corner of another; the rest becomes zero.

    On a reload a parameter holds what lay in its memory before, and none of that need be zero where padding belongs.
    """
    if part.shape != target.shape:
        target.zero_()
    target[: part.shape[0], : part.shape[1]].copy_(part)
