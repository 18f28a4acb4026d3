"""What every pass over a source checkpoint needs to know."""

from dataclasses import dataclass

import torch

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.expert_tensors import layer_names
from ..checkpoints.families import MoEShape
from ..checkpoints.source import SourceCheckpoint
from ..merging.layer import Activation
from ..merging.recipe import Recipe
from .calibration import Calibrator


@dataclass(frozen=True)
class Job:
    """One conversion.

    `names` are the tensors of each decoder layer, None those of no layer. `calibrator` and `token_ids`, int64
    (num_sequences, sequence_length), are both None where no text was given.
    """

    checkpoint: SourceCheckpoint
    names: dict[int | None, list[str]]
    shape: MoEShape
    activation: Activation
    device: torch.device
    calibrator: Calibrator | None
    token_ids: torch.Tensor | None
    max_expert_parallel: int
    recipe: Recipe
    seed: int

    @property
    def decoder_layers(self) -> list[int]:
        return [layer for layer in self.names if layer is not None]

    def names_beside_experts(self, layer: int | None) -> list[str]:
        """The tensors of a layer, or of none, without its routed experts'."""
        if layer is None or layer not in self.shape.moe_layers:
            return self.names[layer]
        experts = {name for names in layer_names(self.shape, layer) for name in names}
        return [name for name in self.names[layer] if name not in experts]


def names_by_layer(checkpoint: Checkpoint, shape: MoEShape) -> dict[int | None, list[str]]:
    """Tensor names by decoder layer, None for those of no layer; one group is one shard of the output."""
    layers: list[int | None] = [None, *range(shape.num_hidden_layers)]
    groups: dict[int | None, list[str]] = {layer: [] for layer in layers}
    prefixes = {shape.layer_prefix(layer): layer for layer in range(shape.num_hidden_layers)}
    for name in sorted(checkpoint.tensors):
        prefix = ".".join(name.split(".")[:3]) + "."
        groups[prefixes.get(prefix)].append(name)
    return {layer: names for layer, names in groups.items() if names}
