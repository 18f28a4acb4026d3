"""The README.md of a packed checkpoint: what it is, how it was made, and its numbers."""

from dataclasses import dataclass

from vllm_puzzle.format import PuzzleMoEQuantizationConfig

from ..checkpoints.writer import CheckpointWriter
from .method import CardSections


@dataclass(frozen=True)
class ConvertResult:
    """Sizes in bytes; `expert_*` counts the routed experts alone. `relative_error` is over all converted weights."""

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
    sections: CardSections
    dequantized: bool


_TEMPLATE = """\
---
tags: [vllm, moe, puzzlemoe]
---
# {name}

`{source}` with its routed experts packed by vllm-puzzle {version}: {summary} Everything else is the source's,
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
{rows}
| source SHA-256 | `{source_sha256}` |

{changes}
"""


def write_model_card(writer: CheckpointWriter, card: ModelCard) -> None:
    """Adds README.md to the checkpoint under construction."""
    provenance, result = card.quantization.provenance, card.result
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
        summary=card.sections.summary,
        rows="\n".join(f"| {name} | {value} |" for name, value in card.sections.rows),
        changes=card.sections.changes,
        source_sha256=provenance.source_sha256,
    )
    writer.add_text("README.md", content)
