"""What every pass over a source checkpoint needs to know."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vllm_puzzle.format import Calibration, FormatError, check_codable, check_storable

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.expert_tensors import StoredExperts, layer_experts, layer_names
from ..checkpoints.shape import MoEShape
from ..checkpoints.source import SourceCheckpoint
from ..errors import CheckpointError
from ..merging.layer import Activation, ExpertWeights
from ..progress import Progress
from .calibration import Calibrator
from .method import Method
from .options import ConvertOptions

TensorNames = dict[int | None, list[str]]
"""The tensors of a checkpoint by decoder layer, None for those of no layer."""


@dataclass(frozen=True)
class Setup:
    """A source that was checked, and what the options mean for it.

    `activation` is the experts'; `methods` are what the options leave open, the best one first; `calibration`, what is
    recorded of the text, and `calibrator` are None without a text.
    """

    checkpoint: SourceCheckpoint
    names: TensorNames
    activation: Activation
    device: torch.device
    options: ConvertOptions
    methods: tuple[Method, ...]
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
        return StoredExperts(self.checkpoint, self.shape, layer, self.activation, self.device, self._check)

    @property
    def _check(self) -> Callable[[Sequence[torch.Tensor], Sequence[str]], None]:
        """Raises FormatError for what cannot be stored: of matrices by their names."""
        return check_storable if self.options.bits is None else check_codable

    def read_experts(self, layer: int) -> ExpertWeights | None:
        """A layer's experts, all at once; None for a dense layer.

        Raises:
            CheckpointError: a tensor cannot be read, or has an element that cannot be stored.
        """
        if layer not in self.shape.moe_layers:
            return None
        names = layer_names(self.shape, layer)
        tensors = self.checkpoint.read(name for matrices in names for name in matrices)
        experts = layer_experts(self.shape, layer, tensors, self.activation, self.device)
        try:
            for expert, matrices in enumerate(names):
                self._check(experts.matrices(expert), matrices)
        except FormatError as error:
            raise CheckpointError(str(error)) from None
        return experts


@dataclass(frozen=True)
class Job(Setup):
    """One conversion: a setup, and how its experts become small."""

    method: Method

    @classmethod
    def of(cls, setup: Setup, method: Method) -> "Job":
        return cls(**vars(setup), method=method)


class LayerProgress:
    """Progress of a conversion in decoder layers, as bytes of its source."""

    def __init__(self, job: Job, progress: Progress) -> None:
        self._progress = progress
        tensors = job.checkpoint.tensors
        self._sizes = {layer: sum(tensors[name].num_bytes for name in group) for layer, group in job.names.items()}
        self._total = job.checkpoint.num_bytes
        if job.method.surveys:
            self._total += sum(self._sizes[layer] for layer in job.decoder_layers)

    def advance(self, layer: int | None) -> None:
        """Tells that a pass is done with a layer, or with all tensors of none."""
        self._progress(self._sizes[layer], self._total)


def names_by_layer(checkpoint: Checkpoint, shape: MoEShape) -> TensorNames:
    """Tensor names, sorted, by decoder layer; groups without any tensor are left out."""
    layers: list[int | None] = [None, *range(shape.num_hidden_layers)]
    groups: TensorNames = {layer: [] for layer in layers}
    for name in sorted(checkpoint.tensors):
        layer = shape.layer_of(name)
        groups[layer if layer in groups else None].append(name)
    return {layer: names for layer, names in groups.items() if names}
