"""What coding did to the experts of a layer, and how the manifest and the model card tell it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from vllm_puzzle.format import LayerCodes

from ..checkpoints.coded import code_bits, describe_widths
from ..checkpoints.manifest import CodedLayerEntry
from ..coding.code_layer import CodingStatistics
from ..merging.changes import WeightChanges
from .method import LayerReport

_CHANGES = """\
## What coding changed

Bits are those of the codes, on average over the layer's weights; widths are the bits of a code, which two weights
share, and how many experts have them. The estimated loss is what coding is expected to add to the layer's output,
relative to the squared residual stream. Relative error is `||W' - W||^2 / ||W||^2` over all experts' weights. Neither
is a measure of quality: measure perplexity or your own task on this checkpoint against the source before you serve it.

| layer | bits a weight | experts x width | estimated loss | relative error |
|---|---|---|---|---|
{rows}"""


@dataclass(frozen=True)
class CodeReport(LayerReport):
    """What coding did to one MoE layer; `loss` is None where nothing was estimated."""

    codes: LayerCodes
    statistics: CodingStatistics
    loss: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {"codes": self.codes.model_dump(), "statistics": asdict(self.statistics)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "CodeReport":
        """What the journal has; the loss was settled before."""
        return cls(LayerCodes(**content["codes"]), CodingStatistics(**content["statistics"]))

    @property
    def changes(self) -> WeightChanges:
        return self.statistics

    def without_loss(self) -> "CodeReport":
        return replace(self, loss=None)

    def to_manifest(self) -> CodedLayerEntry:
        return CodedLayerEntry(
            layer=self.codes.layer,
            bits=code_bits(self.codes),
            estimated_loss=self.loss,
            relative_error=self.statistics.relative_error,
        )


def describe_changes(reports: Sequence[CodeReport]) -> str:
    """What coding changed, for the model card."""
    return _CHANGES.format(rows="\n".join(map(_row, reports)))


def _row(report: CodeReport) -> str:
    entry = report.to_manifest()
    loss = "not estimated" if entry.estimated_loss is None else f"{entry.estimated_loss:.3g}"
    widths = describe_widths(report.codes)
    return f"| {entry.layer} | {entry.bits:.2f} | {widths} | {loss} | {entry.relative_error:.4f} |"
