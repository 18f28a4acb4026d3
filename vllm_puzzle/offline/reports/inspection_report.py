"""What `vllm-puzzle inspect` prints, and the rows that its page shares with it."""

from ..checkpoints.coded import describe_widths
from ..wording import size
from .coded_inspection import CodedLayerInspection
from .inspection import Inspection, LayerInspection
from .tables import aligned

# Characters from light to dark; plain ASCII, so that every terminal can print them.
_RAMP = " .:-=+*#"

_NOTES = """\
shared: elements of the pairs that both members keep; kept: weights of the pairs that survive in their own expert.
{losses}
Exponents: how often each stored field 0 to {last} occurs in the layer, against its most frequent; field 0 is the zero
word, field 1 stands for 2^{smallest}."""

_LOSS_NOTE = "Estimated loss is relative to the squared residual stream. "
_ERROR_NOTE = "Relative error is ||W' - W||^2 / ||W||^2 over paired weights."

_CODED_ERROR_NOTE = "Relative error is ||W' - W||^2 / ||W||^2 over all weights of the experts."

WIDTHS_NOTE = (
    "Bits are those of a weight, stored ones with codebooks and scales; a code of the given width is two weights."
)
"""What the columns of CODED_COLUMNS on bits mean."""

CODED_COLUMNS = ["layer", "bits", "stored", "experts x width", "estimated loss", "relative error"]

LAYER_COLUMNS = ["layer", "slots", "pairs", "shared", "kept", "estimated loss", "relative error"]


def describe_inspection(inspection: Inspection) -> str:
    """The text for a terminal; ends without a newline."""
    facts = "\n".join(f"{name:<15} {value}" for name, value in fact_rows(inspection))
    parts = [f"{inspection.checkpoint}\n{facts}"]
    if inspection.layers:
        parts += _describe_pairs(inspection)
    if inspection.coded_layers:
        rows = [coded_row(layer, inspection.has_manifest) for layer in inspection.coded_layers]
        parts += [aligned([CODED_COLUMNS, *rows]), f"{WIDTHS_NOTE}\n{coded_note(inspection)}"]
    if inspection.plain_layers:
        parts.append(plain_note(inspection))
    return "\n\n".join(parts)


def _describe_pairs(inspection: Inspection) -> list[str]:
    rows = [layer_row(layer, inspection.has_manifest) for layer in inspection.layers]
    table = aligned([LAYER_COLUMNS, *rows]).splitlines()
    histograms = ["exponents", *(f"|{_ramp(layer.exponents)}|" for layer in inspection.layers)]
    width = max(len(line) for line in table)
    lines = "\n".join(f"{line:<{width}}  {histogram}" for line, histogram in zip(table, histograms, strict=True))
    notes = _NOTES.format(
        losses=losses_note(inspection), last=len(inspection.exponents) - 1, smallest=inspection.smallest_exponent
    )
    return [lines, notes]


def fact_rows(inspection: Inspection) -> list[tuple[str, str]]:
    """Names and values of what holds for the whole checkpoint."""
    provenance = inspection.provenance
    calibration = "none (weights' magnitudes alone)"
    if provenance.calibration is not None:
        text = provenance.calibration
        calibration = (
            f"{text.source}, {text.sequences} sequences of {text.sequence_length} tokens, SHA-256 {text.sha256}"
        )
    experts = f"{inspection.num_experts} of 3 x {inspection.intermediate_size} x {inspection.hidden_size} a layer"
    form, made = _coded_facts(inspection) if inspection.coded_layers else ([], [])
    if inspection.layers:
        experts += f", mates within {inspection.max_expert_parallel} rank(s)"
        form = [*form, f"words of {inspection.bits} bits"]
    if provenance.bits is None:
        made = [
            ("aligned", "yes" if provenance.align else "no"),
            ("pairing", provenance.pairing),
            ("compression", f"{provenance.compression:g} %"),
            ("seed", str(provenance.seed)),
        ]
    return [
        ("format version", ", ".join([str(inspection.format_version), *form])),
        ("experts", experts),
        ("size", f"{size(inspection.packed_bytes)} packed of {size(inspection.total_bytes)}"),
        ("rule", provenance.rule if provenance.tau is None else f"{provenance.rule}, tau {provenance.tau:g}"),
        *made,
        ("calibration", calibration),
        ("source SHA-256", provenance.source_sha256),
        ("tool version", provenance.tool_version),
    ]


def _coded_facts(inspection: Inspection) -> tuple[list[str], list[tuple[str, str]]]:
    """What the codes are, and how they were asked for."""
    widths = {bits for layer in inspection.coded_layers for bits in (*layer.w13_bits, *layer.w2_bits)}
    form = f"codes of {' to '.join(map(str, sorted({min(widths), max(widths)})))} bits"
    stored = sum(layer.stored_bits for layer in inspection.coded_layers) / len(inspection.coded_layers)
    asked = inspection.provenance.bits
    even = ", even" if inspection.provenance.even else ""
    wanted = "" if asked is None else f"{asked:g} of codes a weight asked for{even}, "
    return [form], [("bits", f"{wanted}{stored:.2f} stored with codebooks and scales")]


def losses_note(inspection: Inspection) -> str:
    """What the last two of LAYER_COLUMNS mean."""
    estimated = any(layer.estimated_loss is not None for layer in inspection.layers)
    return _LOSS_NOTE * estimated + _ERROR_NOTE


def coded_note(inspection: Inspection) -> str:
    """What the last two of CODED_COLUMNS mean."""
    estimated = any(layer.estimated_loss is not None for layer in inspection.coded_layers)
    return _LOSS_NOTE * estimated + _CODED_ERROR_NOTE


def plain_note(inspection: Inspection) -> str:
    """Which layers' experts are as they were."""
    return f"As in the source: the experts of the layers {', '.join(map(str, inspection.plain_layers))}."


def coded_row(layer: CodedLayerInspection, has_manifest: bool) -> list[str]:
    """One row under CODED_COLUMNS."""
    lacking = "not estimated" if has_manifest else "not recorded"
    return [
        str(layer.layer),
        f"{layer.bits:.2f}",
        f"{layer.stored_bits:.2f}",
        describe_widths(layer.codes),
        lacking if layer.estimated_loss is None else f"{layer.estimated_loss:.3g}",
        "not recorded" if layer.relative_error is None else f"{layer.relative_error:.4f}",
    ]


def layer_row(layer: LayerInspection, has_manifest: bool) -> list[str]:
    """One row under LAYER_COLUMNS."""
    lacking = "not estimated" if has_manifest else "not recorded"
    return [
        str(layer.layer),
        str(layer.slots),
        str(layer.pairs),
        f"{layer.shared_fraction:.1%}",
        f"{layer.kept_fraction:.1%}",
        lacking if layer.estimated_loss is None else f"{layer.estimated_loss:.3g}",
        "not recorded" if layer.relative_error is None else f"{layer.relative_error:.4f}",
    ]


def _ramp(counts: list[int]) -> str:
    # What occurs at all is never shown as blank.
    last = len(_RAMP) - 1
    return "".join(_RAMP[-(-count * last // max(*counts, 1))] for count in counts)
