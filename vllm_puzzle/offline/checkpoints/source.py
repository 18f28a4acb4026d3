"""A checkpoint to be packed, as if it were in the hub's plainest layout: one floating 2-D tensor per expert matrix."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PretrainedConfig

from ..errors import CheckpointError
from .checkpoint import Checkpoint, Stored, TensorInfo
from .fp8 import block_size, dequantize, find_scales
from .layout import Fused
from .model_config import text_config
from .shape import MoEShape, find_moe_shape


class SourceCheckpoint(Checkpoint):
    """A checkpoint of a supported family.

    Block-scaled FP8 tensors read as BF16, three-dimensional expert tensors as one matrix per expert, and what
    transformers calls otherwise has the name of the hub. `tensors` lists what `read` gives; only `num_bytes` is what
    the files hold.

    Raises:
        CheckpointError: see `Checkpoint`; or it is quantized in another way, of no supported family, or a fused tensor
            is missing or misshapen.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.shape: MoEShape = find_moe_shape(self.config, str(path / "config.json"), self.shapes)
        self._block = block_size(self.raw_config, path)
        self._stored = {name: Stored(info.shard, name) for name, info in self.tensors.items()}
        self._scales: dict[str, Stored] = {}
        self._transposed: set[str] = set()
        if self._block is not None:
            for name, scale in find_scales(self.tensors, self._block, path).items():
                self._scales[name] = self._stored.pop(scale)
                info, scale_info = self.tensors[name], self.tensors.pop(scale)
                self.tensors[name] = replace(info, dtype="BF16", num_bytes=info.num_bytes + scale_info.num_bytes)
        for name in list(self.tensors):
            self._rename(name, self.shape.hub_name(name))
        for layer in self.shape.moe_layers:
            for fused in self._fused_layouts(layer):
                self._split_experts(layer, fused)

    @property
    def config(self) -> PretrainedConfig:
        """See `Checkpoint`; says nothing of a quantization, since what `read` gives has none."""
        config = super().config
        for section in (config, text_config(config)):
            if hasattr(section, "quantization_config"):
                del section.quantization_config
        return config

    @property
    def is_quantized(self) -> bool:
        """Whether its files hold FP8, so that not all that `read` gives has their bits."""
        return self._block is not None

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        names = list(names)
        tensors = self.read_stored({name: self._stored[name] for name in names})
        if self._block is not None:
            scales = self.read_stored({name: self._scales[name] for name in names if name in self._scales})
            for name, scale in scales.items():
                tensors[name] = dequantize(tensors[name], scale, self._block)
        for name in self._transposed.intersection(names):
            tensors[name] = tensors[name].T.contiguous()
        return tensors

    def _rename(self, name: str, hub_name: str) -> None:
        if name == hub_name:
            return
        if hub_name in self.tensors:
            raise CheckpointError(f"{self.path}: {name} and {hub_name} are the same tensor by two names; leave one out")
        self.tensors[hub_name] = self.tensors.pop(name)
        self._stored[hub_name] = self._stored.pop(name)
        if name in self._scales:
            self._scales[hub_name] = self._scales.pop(name)

    def _fused_layouts(self, layer: int) -> list[Fused]:
        """The family's, one for each pair of names: of two that differ in their shapes alone, the one that fits."""
        shape, chosen = self.shape, {}
        for fused in self.shape.family.fused:
            names = [shape.block_prefix(layer) + name for name in (fused.gate_up, fused.down)]
            sizes = fused.shapes(shape.num_experts, shape.hidden_size, shape.intermediate_size)
            fits = [self.tensors[name].shape for name in names if name in self.tensors] == list(sizes)
            if fits or tuple(names) not in chosen:
                chosen[tuple(names)] = fused
        return list(chosen.values())

    def _split_experts(self, layer: int, fused: Fused) -> None:
        shape = self.shape
        gate_up, down = (shape.block_prefix(layer) + name for name in (fused.gate_up, fused.down))
        if gate_up not in self.tensors and down not in self.tensors:
            return
        sizes = fused.shapes(shape.num_experts, shape.hidden_size, shape.intermediate_size)
        for name, size in zip((gate_up, down), sizes, strict=True):
            self._check_fused(name, size)
        inner = shape.intermediate_size
        halves = [slice(0, inner), slice(inner, 2 * inner)]
        for projection, name, rows in zip(
            shape.family.projections, (gate_up, gate_up, down), (*halves, slice(None)), strict=True
        ):
            info, stored = self.tensors[name], self._stored[name]
            for expert in range(shape.num_experts):
                expert_name = shape.expert_name(layer, expert, projection)
                if expert_name in self.tensors:
                    raise CheckpointError(f"{self.path}: {expert_name} is in {stored.name} too; leave one of them out")
                index = (expert, slice(None), rows) if fused.transposed else (expert, rows)
                self._stored[expert_name] = replace(stored, index=index)
                size = shape.projection_shape(projection)
                plain = TensorInfo(info.shard, info.dtype, size, 0)
                self.tensors[expert_name] = replace(plain, num_bytes=plain.plain_bytes)
                if fused.transposed:
                    self._transposed.add(expert_name)
        for name in (gate_up, down):
            del self.tensors[name], self._stored[name]

    def _check_fused(self, name: str, size: tuple[int, ...]) -> None:
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{self.path}: expert tensor {name} is missing, though its layer's experts are in three-dimensional "
                f"tensors; {self.remedy}"
            )
        if info.shape != size:
            raise CheckpointError(
                f"{self.path / info.shard}: {self._stored[name].name} has shape {list(info.shape)}, config.json "
                f"implies {list(size)}"
            )
