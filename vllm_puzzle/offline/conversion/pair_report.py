"""What merging did to the pairs of a layer, and how the manifest and the model card tell it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from vllm_puzzle.format import LayerSlots

from ..checkpoints.manifest import LayerEntry
from ..merging.changes import WeightChanges
from ..merging.pair import MergeStatistics
from ..merging.pair_loss import Mates
from .method import LayerReport

_CHANGES = """\
## What merging changed

The estimated loss is what merging the mates as they were, every element by itself, would add to the layer's output,
relative to the squared residual stream; mates that fire together are read in one pass when serving. Relative error is
`||W' - W||^2 / ||W||^2` over the paired experts' weights. None of them is a measure of quality: measure perplexity or
your own task on this checkpoint against the source before you serve it.

| layer | pairs | estimated loss | fire together | elements shared | weights kept | relative error |
|---|---|---|---|---|---|---|
{rows}"""


@dataclass(frozen=True)
class PairReport(LayerReport):
    """What merging did to one MoE layer; `mates` is empty where nothing was estimated."""

    slots: LayerSlots
    statistics: MergeStatistics
    mates: list[Mates]

    def to_json(self) -> dict[str, Any]:
        return {
            "slots": self.slots.model_dump(),
            "statistics": asdict(self.statistics),
            "mates": [asdict(mates) for mates in self.mates],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "PairReport":
        mates = [Mates.from_json(each) for each in content["mates"]]
        return cls(LayerSlots(**content["slots"]), MergeStatistics(**content["statistics"]), mates)

    @property
    def changes(self) -> WeightChanges:
        return self.statistics

    def without_loss(self) -> "PairReport":
        return replace(self, mates=[])

    def to_manifest(self) -> LayerEntry:
        return LayerEntry(
            layer=self.slots.layer,
            pairs=self.slots.pairs,
            estimated_loss=sum(each.loss for each in self.mates) if self.mates else None,
            coactivation=sum(each.coactivation for each in self.mates) / len(self.mates) if self.mates else None,
            shared_fraction=self.statistics.shared_fraction,
            kept_fraction=self.statistics.kept_fraction,
            relative_error=self.statistics.relative_error,
        )


def describe_changes(reports: Sequence[PairReport]) -> str:
    """What merging changed, for the model card."""
    return _CHANGES.format(rows="\n".join(map(_row, reports)))


def _row(report: PairReport) -> str:
    entry = report.to_manifest()
    loss = "not estimated" if entry.estimated_loss is None else f"{entry.estimated_loss:.3g}"
    together = "not estimated" if entry.coactivation is None else f"{entry.coactivation:.1%}"
    return (
        f"| {entry.layer} | {entry.pairs} | {loss} | {together} | {entry.shared_fraction:.1%} "
        f"| {entry.kept_fraction:.1%} | {entry.relative_error:.4f} |"
    )
