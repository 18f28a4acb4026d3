"""The README.md of a packed checkpoint: what it is, how it was made, and its numbers."""

from dataclasses import dataclass

from vllm_puzzle.format import PuzzleMoEQuantizationConfig

from ..checkpoints.writer import CheckpointWriter
from .units import LayerReport


@dataclass(frozen=True)
class ConvertResult:
    """Sizes in bytes; `expert_*` counts the routed experts alone. `relative_error` is over all merged weights."""

    expert_bytes_before: int
    expert_bytes_after: int
    checkpoint_bytes_before: int
    checkpoint_bytes_after: int
    relative_error: float


@dataclass(frozen=True)
class ModelCard:
    """What the card tells: `source` and `name` of the checkpoints; `dequantized` says that the source was FP8."""

    source: str
    name: str
    quantization: PuzzleMoEQuantizationConfig
    result: ConvertResult
    layers: list[LayerReport]
    dequantized: bool


_TEMPLATE = """\
---
tags: [vllm, moe, puzzlemoe]
---
# {name}

`{source}` with its routed experts packed by vllm-puzzle {version}: the two experts of a pair, mates, share one
magnitude per element, and one 16-bit word holds it with the masks and signs of both. Everything else is the source's,
{rest}.

```
pip install vllm-puzzle
vllm serve {name} --quantization puzzlemoe
```

transformers refuses it (`experts_implementation="puzzlemoe"` is not supported): it cannot decode packed experts. Do not
ask for another implementation, which would run on random ones; `vllm-puzzle unpack` writes a plain BF16 checkpoint.

If vLLM says `Unknown quantization method: puzzlemoe`, the `vllm-puzzle` package is missing from its environment
(or `VLLM_PLUGINS` leaves out `puzzlemoe`).

## Sizes

| | source | packed |
|---|---|---|
| routed experts, bytes | {expert_before:,} | {expert_after:,} ({expert_ratio:.1%}) |
| whole checkpoint, bytes | {checkpoint_before:,} | {checkpoint_after:,} ({checkpoint_ratio:.1%}) |

## How it was made

| | |
|---|---|
| rule | {rule} |
| compression asked for | {compression:g} % |
| calibration | {calibration} |
| pairing | {pairing}, within {ranks} rank(s) of {experts_per_rank} experts, seed {seed} |
| source SHA-256 | `{source_sha256}` |

## What merging changed

The estimated loss is what merging the mates as they were, every element by itself, would add to the layer's output,
relative to the squared residual stream; mates that fire together are read in one pass when serving. Relative error is
`||W' - W||^2 / ||W||^2` over the paired experts' weights. None of them is a measure of quality: measure perplexity or
your own task on this checkpoint against the source before you serve it.

| layer | pairs | estimated loss | fire together | elements shared | weights kept | relative error |
|---|---|---|---|---|---|---|
{rows}
"""


def write_model_card(writer: CheckpointWriter, card: ModelCard) -> None:
    """Adds README.md to the checkpoint under construction."""
    provenance, result = card.quantization.provenance, card.result
    calibration = "none (weights' magnitudes alone)"
    if provenance.calibration is not None:
        text = provenance.calibration
        calibration = f"`{text.source}`, {text.sequences} sequences of {text.sequence_length} tokens"
    rule = f"`{provenance.rule}`"
    if provenance.tau is not None:
        rule += f", tau {provenance.tau:g}"
    if provenance.align:
        rule += ", mates' neurons aligned"
    rows = "\n".join(_row(layer) for layer in card.layers)
    content = _TEMPLATE.format(
        name=card.name,
        source=card.source,
        version=provenance.tool_version,
        expert_before=result.expert_bytes_before,
        expert_after=result.expert_bytes_after,
        expert_ratio=result.expert_bytes_after / result.expert_bytes_before,
        checkpoint_before=result.checkpoint_bytes_before,
        checkpoint_after=result.checkpoint_bytes_after,
        checkpoint_ratio=result.checkpoint_bytes_after / result.checkpoint_bytes_before,
        rest="its FP8 tensors written as BF16" if card.dequantized else "bit for bit",
        rule=rule,
        pairing=provenance.pairing,
        compression=provenance.compression,
        calibration=calibration,
        ranks=card.quantization.max_expert_parallel,
        experts_per_rank=card.quantization.num_experts // card.quantization.max_expert_parallel,
        seed=provenance.seed,
        source_sha256=provenance.source_sha256,
        rows=rows,
    )
    writer.add_text("README.md", content)


def _row(report: LayerReport) -> str:
    statistics = report.statistics
    loss = together = "not estimated"
    if report.mates:
        loss = f"{sum(each.loss for each in report.mates):.3g}"
        together = f"{sum(each.coactivation for each in report.mates) / len(report.mates):.1%}"
    return (
        f"| {report.slots.layer} | {report.slots.pairs} | {loss} | {together} | {statistics.shared_fraction:.1%} "
        f"| {statistics.kept_fraction:.1%} | {statistics.relative_error:.4f} |"
    )
