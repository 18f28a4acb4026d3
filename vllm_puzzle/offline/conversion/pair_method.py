"""Pairs of experts that share their words: how a conversion chooses, merges and describes them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from vllm_puzzle.format import WORD16, LayerSlots, packed_name, unpack

from ..checkpoints.expert_tensors import layer_names
from ..checkpoints.shape import MoEShape
from ..checkpoints.shards import TensorLayout
from ..merging.layer import ExpertWeights, LayerTokens
from ..merging.merge_layer import merge_layer
from ..merging.packing import LIBRARY_PATH, is_compiled
from ..merging.pair_loss import Mates
from ..merging.recipe import Recipe
from .choose_pairs import choose_pairs, draw_pairs
from .estimate import Estimate, Speed
from .job import Setup
from .method import CardSections, Choices, LayerReport, Layout, Method, Read, Write, calibration_row
from .pair_estimate import estimate_merging
from .pair_report import PairReport, describe_changes
from .pairing import PairBudget
from .work import Work

_SUMMARY = """\
the two experts of a pair, mates, share one
magnitude per element, and one 16-bit word holds it with the masks and signs of both."""


@dataclass(frozen=True)
class ChosenPairs(Choices):
    """The slots of every MoE layer, and what to expect of their pairs: no layer's where all were drawn at random."""

    slots: dict[int, LayerSlots]
    mates: dict[int, list[Mates]]

    @property
    def layouts(self) -> Mapping[int, Layout]:
        return self.slots

    def to_json(self) -> dict[str, Any]:
        return {
            "slots": [each.model_dump() for each in self.slots.values()],
            "mates": [[layer, [asdict(each) for each in chosen]] for layer, chosen in self.mates.items()],
        }

    def complete(self, report: LayerReport) -> LayerReport:
        assert isinstance(report, PairReport)
        return replace(report, mates=self.mates[report.slots.layer]) if self.mates else report


@dataclass(frozen=True)
class PairMethod(Method):
    """Merges mates by a recipe, as many as the budget has, which brings `compression` percent."""

    recipe: Recipe
    budget: PairBudget
    compression: float

    @property
    def rule(self) -> str:
        return self.recipe.rule.name

    @property
    def title(self) -> str:
        return f"rule {self.rule}{' with aligned neurons' if self.recipe.align else ''}"

    @property
    def blind_notice(self) -> str:
        return "experts are weighed by the magnitude of their weights alone"

    @property
    def missing_library(self) -> Path | None:
        return None if is_compiled() else LIBRARY_PATH

    @property
    def sequential(self) -> bool:
        return self.recipe.rule.sequential

    @property
    def idle_consequence(self) -> str:
        return self.recipe.rule.idle_consequence

    @property
    def surveys(self) -> bool:
        return self.recipe.chooses(self.budget.all_paired)

    def estimate(self, work: Work, speed: Speed) -> Estimate:
        return estimate_merging(self.recipe, self.budget, work, speed)

    def settle(self, setup: Setup, advance: Callable[[int], None]) -> ChosenPairs:
        if not self.surveys:
            return ChosenPairs(draw_pairs(setup, self.budget), {})
        return ChosenPairs(*choose_pairs(setup, self.recipe, self.budget, advance))

    def read_choices(self, content: Mapping[str, Any]) -> ChosenPairs:
        slots = [LayerSlots(**each) for each in content["slots"]]
        mates = {layer: [Mates.from_json(each) for each in chosen] for layer, chosen in content["mates"]}
        return ChosenPairs({each.layer: each for each in slots}, mates)

    def describe_choices(self, setup: Setup, choices: Choices) -> str | None:
        assert isinstance(choices, ChosenPairs)
        return self._describe_mates(setup, list(choices.mates.values())) if self.surveys else None

    def describe_reports(self, setup: Setup, reports: Sequence[LayerReport]) -> str | None:
        if self.surveys or not self.recipe.rule.estimates_loss:
            return None
        return self._describe_mates(setup, [each.mates for each in cast(Sequence[PairReport], reports)])

    def _describe_mates(self, setup: Setup, layers: Sequence[Sequence[Mates]]) -> str:
        chosen = [each for layer in layers for each in layer]
        if not chosen:
            return "no experts are paired"
        sizes = [len(layer) for layer in layers]
        fewest, most = min(sizes), max(sizes)
        each_layer = str(most) if fewest == most else f"{fewest} to {most}"
        counts = f"pairing {self.recipe.pairing}: {len(chosen)} pairs, {each_layer} a layer"
        if setup.calibrator is None:
            return counts
        loss = sum(each.loss for each in chosen) / len(layers)
        coactivation = sum(each.coactivation for each in chosen) / len(chosen)
        return (
            f"{counts}; estimated loss {loss:.3g} of the residual stream's energy a layer, mates fire together on "
            f"{coactivation:.1%} of the tokens that reach either"
        )

    def lay_out(self, shape: MoEShape, layout: Layout) -> Iterator[TensorLayout]:
        assert isinstance(layout, LayerSlots)
        for slot in range(layout.num_slots):
            for projection in shape.family.projections:
                name = packed_name(shape.experts_prefix(layout.layer), layout.first_member(slot), projection)
                size = shape.projection_shape(projection)
                yield TensorLayout(name, WORD16.safetensors_dtype, size, 2 * size[0] * size[1])

    def convert_layer(
        self,
        setup: Setup,
        layout: Layout,
        read: Read,
        write: Write,
        tokens: LayerTokens | None,
        converted: ExpertWeights | None,
    ) -> PairReport:
        assert isinstance(layout, LayerSlots)
        slots, shape = layout, setup.shape
        prefix, names = shape.experts_prefix(slots.layer), layer_names(shape, slots.layer)

        def emit(slot: int, position: int, words: torch.Tensor) -> None:
            members = slots.members(slot)
            write(packed_name(prefix, members[0], shape.family.projections[position]), words)
            if converted is not None:
                for member, expert in enumerate(members):
                    (converted.gate, converted.up, converted.down)[position][expert] = unpack(words, member)

        done = merge_layer(read, setup.activation, names, slots, self.recipe, emit, tokens)
        return PairReport(slots, done.statistics, done.mates)

    def read_report(self, content: Mapping[str, Any]) -> PairReport:
        return PairReport.from_json(content)

    def provenance(self) -> dict[str, Any]:
        return {
            "tau": float(self.recipe.tau) if self.recipe.rule.reads_tau else None,
            "align": self.recipe.align,
            "pairing": self.recipe.pairing,
            "compression": float(self.compression),
        }

    def quantization(self, setup: Setup, layouts: Sequence[Layout]) -> dict[str, Any]:
        return {"max_expert_parallel": self.budget.max_expert_parallel, "layers": list(layouts)}

    def manifest(self, reports: Sequence[LayerReport]) -> dict[str, Any]:
        return {"layers": [report.to_manifest() for report in cast(Sequence[PairReport], reports)]}

    def card(self, setup: Setup, reports: Sequence[LayerReport]) -> CardSections:
        provenance, ranks = self.provenance(), self.budget.max_expert_parallel
        rule = f"`{self.rule}`"
        if provenance["tau"] is not None:
            rule += f", tau {provenance['tau']:g}"
        if provenance["align"]:
            rule += ", mates' neurons aligned"
        per_rank, seed = setup.shape.num_experts // ranks, setup.options.seed
        rows = (
            ("rule", rule),
            ("compression asked for", f"{provenance['compression']:g} %"),
            calibration_row(setup),
            ("pairing", f"{provenance['pairing']}, within {ranks} rank(s) of {per_rank} experts, seed {seed}"),
        )
        return CardSections(_SUMMARY, rows, describe_changes(cast(Sequence[PairReport], reports)))

    @property
    def num_pairs(self) -> int:
        return self.budget.total

    def expert_ranks(self, num_experts: int) -> int:
        # A pair stays on one rank for as many ranks as this.
        return self.budget.max_expert_parallel

    def expert_bytes(self, shape: MoEShape) -> int:
        slots = shape.num_experts * len(shape.moe_layers) - self.budget.total
        return slots * 3 * shape.hidden_size * shape.intermediate_size * WORD16.bits // 8
