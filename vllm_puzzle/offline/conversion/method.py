"""What a conversion has to know of the form that experts take: one interface for pairs and for codes.

`Job` knows its method by this interface alone, and so do the units, the runner and the files around the shards.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_puzzle.format import LayerCodes, LayerSlots

from ..checkpoints.shape import MoEShape
from ..checkpoints.shards import TensorLayout
from ..merging.changes import WeightChanges
from ..merging.layer import ExpertWeights, LayerTokens

if TYPE_CHECKING:
    from .estimate import Estimate, Speed
    from .job import Setup
    from .work import Work

Layout = LayerSlots | LayerCodes
"""The form that the experts of one MoE layer take."""

Read = Callable[[int], list[torch.Tensor]]
"""Takes an expert's id, returns its gate, up and down."""

Write = Callable[[str, torch.Tensor], None]
"""Takes the name of a tensor of the checkpoint and the tensor, in the order of `Method.lay_out`."""


class LayerReport(ABC):
    """What converting did to one MoE layer."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """For the journal; see `Method.read_report`."""

    @property
    @abstractmethod
    def changes(self) -> WeightChanges:
        """What it did to the weights."""

    @abstractmethod
    def without_loss(self) -> LayerReport:
        """The same without what was estimated."""


class Choices(ABC):
    """The form of every MoE layer's experts, settled before anything is written."""

    @property
    @abstractmethod
    def layouts(self) -> Mapping[int, Layout]:
        """By decoder layer."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """For the journal; see `Method.read_choices`."""

    @abstractmethod
    def complete(self, report: LayerReport) -> LayerReport:
        """A layer's report with what was expected of the layer when it was settled."""


@dataclass(frozen=True)
class CardSections:
    """The parts of a model card that depend on the method: Markdown, without a line end.

    `summary` says what packed experts are, `rows` are names and values of how they were made, `changes` is a
    section on what that did to each layer.
    """

    summary: str
    rows: Sequence[tuple[str, str]]
    changes: str


def calibration_row(setup: Setup) -> tuple[str, str]:
    """The text that experts were weighed on, for `CardSections.rows`."""
    text = setup.calibration
    if text is None:
        return "calibration", "none (weights' magnitudes alone)"
    return "calibration", f"`{text.source}`, {text.sequences} sequences of {text.sequence_length} tokens"


class Method(ABC):
    """How a conversion makes experts small; can be sent to another process."""

    @property
    @abstractmethod
    def rule(self) -> str:
        """What `--rule` and the provenance call it."""

    @property
    @abstractmethod
    def title(self) -> str:
        """The rule and what was chosen around it, for a sentence."""

    @property
    @abstractmethod
    def blind_notice(self) -> str:
        """What the method does without a calibration text, as part of a sentence."""

    @property
    @abstractmethod
    def missing_library(self) -> Path | None:
        """Where the loops for CPUs would be if they had been compiled at install, None where they are."""

    @property
    @abstractmethod
    def sequential(self) -> bool:
        """Whether each layer makes up for those before it, so that they are converted one after the other."""

    @property
    @abstractmethod
    def idle_consequence(self) -> str:
        """What happens to experts that no calibration token reached, as part of a sentence."""

    @property
    @abstractmethod
    def surveys(self) -> bool:
        """Whether `settle` passes over all decoder layers."""

    @abstractmethod
    def estimate(self, work: Work, speed: Speed) -> Estimate:
        """What a conversion costs; within a factor of two where `speed` is right."""

    @abstractmethod
    def settle(self, setup: Setup, advance: Callable[[int], None]) -> Choices:
        """Settles the form of every layer's experts.

        Args:
            advance: told of each layer that is done, where the method `surveys`.

        Raises:
            CheckpointError: a layer cannot be read, does not fit transformers' own model, or cannot be stored.
        """

    @abstractmethod
    def read_choices(self, content: Mapping[str, Any]) -> Choices:
        """What `Choices.to_json` gave."""

    @abstractmethod
    def describe_choices(self, setup: Setup, choices: Choices) -> str | None:
        """A sentence on what was settled, None where there is nothing to say before it is written."""

    @abstractmethod
    def describe_reports(self, setup: Setup, reports: Sequence[LayerReport]) -> str | None:
        """A sentence on what was written, None where it was said before."""

    @abstractmethod
    def lay_out(self, shape: MoEShape, layout: Layout) -> Iterator[TensorLayout]:
        """The tensors of one layer's experts, in the order in which they are written."""

    @abstractmethod
    def convert_layer(
        self,
        setup: Setup,
        layout: Layout,
        read: Read,
        write: Write,
        tokens: LayerTokens | None,
        converted: ExpertWeights | None,
    ) -> LayerReport:
        """Makes one layer's experts small, and writes them.

        Args:
            read: called once for each expert; few are in memory at a time.
            tokens: the calibration tokens at this layer, None without a text.
            converted: receives the experts as a reader of the checkpoint finds them.

        Raises:
            FormatError: an element that cannot be stored; names tensor and index.
        """

    @abstractmethod
    def read_report(self, content: Mapping[str, Any]) -> LayerReport:
        """What `LayerReport.to_json` gave."""

    @abstractmethod
    def provenance(self) -> dict[str, Any]:
        """The fields of `Provenance` that the options around the rule decide."""

    @abstractmethod
    def quantization(self, setup: Setup, layouts: Sequence[Layout]) -> dict[str, Any]:
        """The fields of `PuzzleMoEQuantizationConfig` that say how the experts are stored."""

    @abstractmethod
    def manifest(self, reports: Sequence[LayerReport]) -> dict[str, Any]:
        """The fields of `Manifest` that say what was done to the layers."""

    @abstractmethod
    def card(self, setup: Setup, reports: Sequence[LayerReport]) -> CardSections:
        """What a model card says of this method."""

    @property
    @abstractmethod
    def num_pairs(self) -> int:
        """How many pairs of experts share a slot, in all layers together."""

    @abstractmethod
    def expert_ranks(self, num_experts: int) -> int:
        """A number that the expert-parallel ranks have to divide."""

    @abstractmethod
    def expert_bytes(self, shape: MoEShape) -> int:
        """The bytes that all experts take on disk, to within what a budget leaves open."""
