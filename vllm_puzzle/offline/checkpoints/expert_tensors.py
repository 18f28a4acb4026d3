"""Which tensors of a checkpoint are expert matrices, and whether they are all there with the right shapes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch

from vllm_puzzle.format import FormatError, is_expert_tensor

from ..errors import CheckpointError
from ..merging.layer import Activation, ExpertWeights
from .checkpoint import FLOATING_DTYPES, Checkpoint
from .shape import MoEShape


def expected_experts(shape: MoEShape) -> dict[str, tuple[int, int]]:
    """The name and shape of every expert matrix that the config promises."""
    return dict(_promised(shape))


def _promised(shape: MoEShape) -> Iterator[tuple[str, tuple[int, int]]]:
    for layer in shape.moe_layers:
        for expert in range(shape.num_experts):
            for projection in shape.family.projections:
                yield shape.expert_name(layer, expert, projection), shape.projection_shape(projection)


def layer_names(shape: MoEShape, layer: int) -> list[list[str]]:
    """The names on disk of gate, up and down of every expert of a layer."""
    return [shape.expert_names(layer, expert) for expert in range(shape.num_experts)]


def layer_experts(
    shape: MoEShape, layer: int, tensors: Mapping[str, torch.Tensor], activation: Activation, device: torch.device
) -> ExpertWeights:
    """A layer's experts, out of all that the checkpoint holds for it by name on disk."""
    matrices = [[tensors[name].to(device) for name in names] for names in layer_names(shape, layer)]
    gate, up, down = (list(kind) for kind in zip(*matrices, strict=True))
    return ExpertWeights(gate, up, down, activation)


@dataclass(frozen=True)
class StoredExperts:
    """A layer's experts; each is read whenever tokens are run through it, and not kept.

    `check` raises FormatError for a matrix that cannot be stored: of one expert's, and their names.
    """

    checkpoint: Checkpoint
    shape: MoEShape
    layer: int
    activation: Activation
    device: torch.device
    check: Callable[[Sequence[torch.Tensor], Sequence[str]], None]

    @property
    def num_experts(self) -> int:
        return self.shape.num_experts

    def output(self, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        """See `Experts`; raises CheckpointError where a tensor cannot be read, or `check` refuses it."""
        tensors = self.checkpoint.read(self.shape.expert_names(self.layer, expert))
        matrices = tensors.values()
        try:
            self.check(list(matrices), list(tensors))
        except FormatError as error:
            raise CheckpointError(str(error)) from None
        gate, up, down = ([matrix.to(self.device)] for matrix in matrices)
        return ExpertWeights(gate, up, down, self.activation).output(0, hidden)


def fuse_experts(shape: MoEShape, layer: int, tensors: MutableMapping[str, torch.Tensor]) -> None:
    """Puts a layer's matrices into three-dimensional tensors, where the family is published so and tools expect it."""
    if not shape.family.hub_is_fused:
        return
    fused = shape.family.fused[0]
    gate, up, down = zip(*([tensors.pop(name) for name in names] for names in layer_names(shape, layer)), strict=True)
    gate_up = torch.stack([torch.cat(rows) for rows in zip(gate, up, strict=True)])
    for name, whole in ((fused.gate_up, gate_up), (fused.down, torch.stack(down))):
        tensors[shape.block_prefix(layer) + name] = whole.mT if fused.transposed else whole


def check_experts(checkpoint: Checkpoint, shape: MoEShape) -> None:
    """Raises CheckpointError for the first expert tensor that is missing, misshapen, unexpected or of a wrong dtype."""
    # One at a time: a number of experts that is far too large is found at the first tensor that is not there.
    for name, size in _promised(shape):
        _check_tensor(checkpoint, name, size)
    check_expert_places(checkpoint.tensors, shape, str(checkpoint.path))
    expected = expected_experts(shape)
    for name in sorted(checkpoint.tensors):
        if name not in expected and _is_expert(name, shape):
            raise CheckpointError(
                f"{checkpoint.path}: nothing is known of expert tensor {name}; {shape.family.architecture} experts are "
                f"2-D tensors named like {next(iter(expected))}"
            )


def check_expert_places(names: Iterable[str], shape: MoEShape, where: str) -> None:
    """Raises CheckpointError for the first expert tensor of a layer or an expert that the config does not have.

    Args:
        names: of tensors, as on the hub.
        where: what an error message calls the checkpoint.
    """
    for name in sorted(names):
        if _is_expert(name, shape) and (place := _unknown_place(name, shape)):
            raise CheckpointError(
                f"{where}: expert tensor {name} is of {place}; correct config.json if it is not this checkpoint's, or "
                f"download both again"
            )


def _is_expert(name: str, shape: MoEShape) -> bool:
    return is_expert_tensor(name) and not shape.is_beside(name)


def _unknown_place(name: str, shape: MoEShape) -> str | None:
    """The layer or expert of a tensor and what config.json says instead; None where the two agree."""
    layer = shape.layer_of(name)
    if layer is None or not name.startswith(f"{shape.experts_prefix(layer)}."):
        return None
    family = shape.family
    if layer >= shape.num_hidden_layers:
        mtp = f" and {family.num_mtp_layers} {shape.num_mtp_layers}" if family.num_mtp_layers else ""
        return f"layer {layer}, but config.json has num_hidden_layers {shape.num_hidden_layers}{mtp}"
    if layer not in shape.moe_layers:
        return f"layer {layer}, but by config.json only the layers {list(shape.moe_layers)} have experts"
    expert = name.removeprefix(f"{shape.experts_prefix(layer)}.").split(".")[0]
    if expert.isdecimal() and int(expert) >= shape.num_experts:
        return f"expert {expert}, but config.json has {family.num_experts} {shape.num_experts}"
    return None


def _check_tensor(checkpoint: Checkpoint, name: str, size: tuple[int, int]) -> None:
    info = checkpoint.tensors.get(name)
    if info is None:
        raise CheckpointError(
            f"{checkpoint.path}: expert tensor {name} is missing, though config.json implies it; one of them is of "
            f"another checkpoint, so {checkpoint.remedy}"
        )
    if info.shape != size:
        raise CheckpointError(
            f"{checkpoint.path / info.shard}: {name} has shape {list(info.shape)}, config.json implies {list(size)}"
        )
    if info.dtype not in FLOATING_DTYPES:
        raise CheckpointError(
            f"{checkpoint.path / info.shard}: {name} is {info.dtype}; experts must be one of {list(FLOATING_DTYPES)}, "
            f"so dequantize the checkpoint first"
        )
