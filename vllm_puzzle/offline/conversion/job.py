"""What every pass over a source checkpoint needs to know."""

from dataclasses import dataclass

import torch

from vllm_puzzle.format import Calibration

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.expert_tensors import StoredExperts, layer_names
from ..checkpoints.families import MoEShape
from ..checkpoints.source import SourceCheckpoint
from ..merging.layer import Activation
from ..merging.recipe import Recipe
from ..progress import Progress
from .calibration import Calibrator
from .options import ConvertOptions
from .pairing import PairBudget

TensorNames = dict[int | None, list[str]]
"""The tensors of a checkpoint by decoder layer, None for those of no layer."""


@dataclass(frozen=True)
class Setup:
    """A source that was checked, and what the options mean for it.

    `activation` is the experts'; `calibration`, what is recorded of the text, and `calibrator` are None without a text.
    """

    checkpoint: SourceCheckpoint
    names: TensorNames
    activation: Activation
    device: torch.device
    options: ConvertOptions
    budget: PairBudget
    calibration: Calibration | None
    calibrator: Calibrator | None

    @property
    def shape(self) -> MoEShape:
        return self.checkpoint.shape

    @property
    def decoder_layers(self) -> list[int]:
        return [layer for layer in self.names if layer is not None]

    def names_beside_experts(self, layer: int | None) -> list[str]:
        """The tensors of a layer, or of none, without its routed experts'."""
        if layer is None or layer not in self.shape.moe_layers:
            return self.names[layer]
        experts = {name for names in layer_names(self.shape, layer) for name in names}
        return [name for name in self.names[layer] if name not in experts]

    def stored_experts(self, layer: int) -> StoredExperts | None:
        """A layer's experts, read when they are used; None for a dense layer."""
        if layer not in self.shape.moe_layers:
            return None
        return StoredExperts(self.checkpoint, self.shape, layer, self.activation, self.device)


@dataclass(frozen=True)
class Job(Setup):
    """One conversion: a setup, and how its experts are paired and merged."""

    recipe: Recipe

    @classmethod
    def of(cls, setup: Setup, recipe: Recipe) -> "Job":
        return cls(**vars(setup), recipe=recipe)

    @property
    def chooses_pairs(self) -> bool:
        """Whether a pass over all decoder layers estimates what pairs lose, before the one that merges."""
        return self.recipe.chooses(self.budget.all_paired)


class LayerProgress:
    """Progress of a conversion in decoder layers, as bytes of its source."""

    def __init__(self, job: Job, progress: Progress) -> None:
        self._progress = progress
        tensors = job.checkpoint.tensors
        self._sizes = {layer: sum(tensors[name].num_bytes for name in group) for layer, group in job.names.items()}
        self._total = job.checkpoint.num_bytes
        if job.chooses_pairs:
            self._total += sum(self._sizes[layer] for layer in job.decoder_layers)

    def advance(self, layer: int | None) -> None:
        """Tells that a pass is done with a layer, or with all tensors of none."""
        self._progress(self._sizes[layer], self._total)


def names_by_layer(checkpoint: Checkpoint, shape: MoEShape) -> TensorNames:
    """Tensor names, sorted, by decoder layer; groups without any tensor are left out."""
    layers: list[int | None] = [None, *range(shape.num_hidden_layers)]
    groups: TensorNames = {layer: [] for layer in layers}
    prefixes = {shape.layer_prefix(layer): layer for layer in range(shape.num_hidden_layers)}
    for name in sorted(checkpoint.tensors):
        prefix = ".".join(name.split(".")[:3]) + "."
        groups[prefixes.get(prefix)].append(name)
    return {layer: names for layer, names in groups.items() if names}
