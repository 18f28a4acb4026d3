"""What `vllm-puzzle inspect` prints, and the rows that its page shares with it."""

from ..wording import size
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

LAYER_COLUMNS = ["layer", "slots", "pairs", "shared", "kept", "estimated loss", "relative error"]


def describe_inspection(inspection: Inspection) -> str:
    """The text for a terminal; ends without a newline."""
    facts = "\n".join(f"{name:<15} {value}" for name, value in fact_rows(inspection))
    rows = [layer_row(layer, inspection.has_manifest) for layer in inspection.layers]
    table = aligned([LAYER_COLUMNS, *rows]).splitlines()
    histograms = ["exponents", *(f"|{_ramp(layer.exponents)}|" for layer in inspection.layers)]
    width = max(len(line) for line in table)
    lines = "\n".join(f"{line:<{width}}  {histogram}" for line, histogram in zip(table, histograms, strict=True))
    notes = _NOTES.format(
        losses=losses_note(inspection), last=len(inspection.exponents) - 1, smallest=inspection.smallest_exponent
    )
    return f"{inspection.checkpoint}\n{facts}\n\n{lines}\n\n{notes}"


def fact_rows(inspection: Inspection) -> list[tuple[str, str]]:
    """Names and values of what holds for the whole checkpoint."""
    provenance = inspection.provenance
    calibration = "none (weights' magnitudes alone)"
    if provenance.calibration is not None:
        text = provenance.calibration
        calibration = (
            f"{text.source}, {text.sequences} sequences of {text.sequence_length} tokens, SHA-256 {text.sha256}"
        )
    return [
        ("format version", f"{inspection.format_version}, words of {inspection.bits} bits"),
        (
            "experts",
            f"{inspection.num_experts} of 3 x {inspection.intermediate_size} x {inspection.hidden_size} a layer, "
            f"mates within {inspection.max_expert_parallel} rank(s)",
        ),
        ("size", f"{size(inspection.packed_bytes)} packed of {size(inspection.total_bytes)}"),
        ("rule", provenance.rule if provenance.tau is None else f"{provenance.rule}, tau {provenance.tau:g}"),
        ("aligned", "yes" if provenance.align else "no"),
        ("pairing", provenance.pairing),
        ("compression", f"{provenance.compression:g} %"),
        ("seed", str(provenance.seed)),
        ("calibration", calibration),
        ("source SHA-256", provenance.source_sha256),
        ("tool version", provenance.tool_version),
    ]


def losses_note(inspection: Inspection) -> str:
    """What the last two of LAYER_COLUMNS mean."""
    estimated = any(layer.estimated_loss is not None for layer in inspection.layers)
    return _LOSS_NOTE * estimated + _ERROR_NOTE


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
