"""Coded experts: how a conversion spends its bits, codes the experts and describes them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from vllm_puzzle.format import CODE_BITS, LayerCodes, coded_tensors

from ..checkpoints.coded import code_bits, lay_out_coded, stored_bits
from ..checkpoints.expert_tensors import layer_names
from ..checkpoints.shape import MoEShape
from ..checkpoints.shards import TensorLayout
from ..coding.budget import bytes_at, expert_bytes
from ..coding.code_layer import code_layer
from ..coding.compiled import LIBRARY_PATH, is_compiled
from ..coding.expert import CodedExpert
from ..defaults import CODE_RULE
from ..merging.layer import ExpertWeights, LayerTokens
from .choose_bits import choose_bits
from .code_estimate import estimate_coding
from .code_report import CodeReport, describe_changes
from .estimate import Estimate, Speed
from .job import Setup
from .method import CardSections, Choices, LayerReport, Layout, Method, Read, Write, calibration_row
from .work import Work

_SUMMARY = """\
one code of 4 to 8 bits stands for two weights of an
expert, a neuron's gate and up or two rows of down; each is a coordinate of a point in the expert's codebook times the
scale of its row."""


@dataclass(frozen=True)
class ChosenCodes(Choices):
    """The codes of every MoE layer, and what each is expected to lose: no layer's where all have one width."""

    codes: dict[int, LayerCodes]
    losses: dict[int, float]

    @property
    def layouts(self) -> Mapping[int, Layout]:
        return self.codes

    def to_json(self) -> dict[str, Any]:
        codes = [each.model_dump() for each in self.codes.values()]
        return {"codes": codes, "losses": [list(each) for each in self.losses.items()]}

    def complete(self, report: LayerReport) -> LayerReport:
        assert isinstance(report, CodeReport)
        return replace(report, loss=self.losses.get(report.codes.layer))


@dataclass(frozen=True)
class CodeMethod(Method):
    """Codes each expert by itself, in `bits` a weight over all layers.

    Attributes:
        even: the experts of a layer have codes of one width.
        calibrated: there is a text to weigh the experts on.
    """

    bits: float
    even: bool
    calibrated: bool

    @property
    def rule(self) -> str:
        return CODE_RULE

    @property
    def title(self) -> str:
        return f"rule {self.rule} at {self.bits:g} bits a weight{', even,' if self.even else ''}"

    @property
    def blind_notice(self) -> str:
        return "codebooks are fitted to the weights by plain k-means, and every weight counts alike"

    @property
    def missing_library(self) -> Path | None:
        return None if is_compiled() else LIBRARY_PATH

    @property
    def sequential(self) -> bool:
        return self.calibrated

    @property
    def idle_consequence(self) -> str:
        return "they are weighed as if they had seen one of the layer's"

    @property
    def surveys(self) -> bool:
        # Without tokens nothing tells what an error in one layer costs beside one in another.
        return self._own_width is None or (self.calibrated and not self.even)

    @property
    def _own_width(self) -> int | None:
        """The width of code that is exactly so many bits a weight, None where there is none."""
        return next((width for width in CODE_BITS if width == 2 * self.bits), None)

    def estimate(self, work: Work, speed: Speed) -> Estimate:
        return estimate_coding(work, speed, self.bits, self.calibrated, self.surveys)

    def settle(self, setup: Setup, advance: Callable[[int], None]) -> ChosenCodes:
        if self.surveys:
            return ChosenCodes(*choose_bits(setup, self.bits, self.even, advance))
        assert self._own_width is not None
        num_experts = setup.shape.num_experts
        even = {layer: LayerCodes.even(layer, num_experts, self._own_width) for layer in setup.shape.moe_layers}
        return ChosenCodes(even, {})

    def read_choices(self, content: Mapping[str, Any]) -> ChosenCodes:
        codes = [LayerCodes(**each) for each in content["codes"]]
        return ChosenCodes({each.layer: each for each in codes}, dict(content["losses"]))

    def describe_choices(self, setup: Setup, choices: Choices) -> str | None:
        assert isinstance(choices, ChosenCodes)
        if not self.surveys:
            return None
        spent = [code_bits(codes) for codes in choices.codes.values()]
        sentence = f"bits: {min(spent):.2f} to {max(spent):.2f} a weight by layer, {sum(spent) / len(spent):.2f} in all"
        if setup.calibrator is None:
            return sentence
        loss = sum(choices.losses.values()) / len(spent)
        return f"{sentence}; estimated loss {loss:.3g} of the residual stream's energy a layer"

    def describe_reports(self, setup: Setup, reports: Sequence[LayerReport]) -> str | None:
        return None

    def lay_out(self, shape: MoEShape, layout: Layout) -> Iterator[TensorLayout]:
        assert isinstance(layout, LayerCodes)
        for expert in range(layout.num_experts):
            yield from lay_out_coded(shape, layout, expert)

    def convert_layer(
        self,
        setup: Setup,
        layout: Layout,
        read: Read,
        write: Write,
        tokens: LayerTokens | None,
        converted: ExpertWeights | None,
    ) -> CodeReport:
        assert isinstance(layout, LayerCodes)
        shape = setup.shape
        prefix, names = shape.experts_prefix(layout.layer), layer_names(shape, layout.layer)

        def emit(expert: int, coded: CodedExpert) -> None:
            stored = coded_tensors(prefix, expert, shape.family.projections)
            for tensor, values in zip(stored, coded.tensors(), strict=True):
                write(tensor.name, values)
            if converted is not None:
                converted.put(expert, coded.matrices())

        return CodeReport(layout, code_layer(read, setup.activation, names, layout, emit, tokens))

    def read_report(self, content: Mapping[str, Any]) -> CodeReport:
        return CodeReport.from_json(content)

    def provenance(self) -> dict[str, Any]:
        pairs = {"tau": None, "align": False, "pairing": "none", "compression": 0.0}
        return {**pairs, "bits": float(self.bits), "even": self.even}

    def quantization(self, setup: Setup, layouts: Sequence[Layout]) -> dict[str, Any]:
        num_experts = setup.shape.num_experts
        return {
            "format_version": 2,
            "max_expert_parallel": self.expert_ranks(num_experts),
            "layers": [],
            "coded_layers": list(layouts),
        }

    def manifest(self, reports: Sequence[LayerReport]) -> dict[str, Any]:
        entries = [report.to_manifest() for report in cast(Sequence[CodeReport], reports)]
        return {"manifest_version": 2, "coded_layers": entries}

    def card(self, setup: Setup, reports: Sequence[LayerReport]) -> CardSections:
        coded = cast(Sequence[CodeReport], reports)
        stored = stored_bits(setup.shape, [report.codes for report in coded])
        widths = "one width of codes a layer" if self.even else "widths of codes by layer and expert"
        if not self.surveys:
            widths = "one width of codes"
        rows = (
            ("rule", f"`{self.rule}`"),
            ("bits a weight asked for", f"{self.bits:g}, {widths}"),
            ("bits a weight stored", f"{stored:.2f}, with codebooks and scales"),
            calibration_row(setup),
        )
        return CardSections(_SUMMARY, rows, describe_changes(coded))

    @property
    def num_pairs(self) -> int:
        return 0

    def expert_ranks(self, num_experts: int) -> int:
        # Nothing ties two experts together.
        return num_experts

    def expert_bytes(self, shape: MoEShape) -> int:
        sizes = expert_bytes(shape.hidden_size, shape.intermediate_size)
        return round(bytes_at(self.bits, sizes) * shape.num_experts * len(shape.moe_layers))
