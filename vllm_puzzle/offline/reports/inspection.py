"""What a packed checkpoint holds, layer by layer: its provenance, its words and its codes, and what they cost."""

import math
from collections.abc import Callable
from pathlib import Path

import torch

from vllm_puzzle.format import LayerSlots, Provenance, Strict, WordLayout, packed_name, parse_expert_name, unpack

from ..checkpoints.manifest import MANIFEST_FILE, CodedLayerEntry, LayerEntry, read_manifest
from ..checkpoints.packed import PackedCheckpoint
from ..merging.pair import MergeStatistics
from ..progress import Progress
from ..wording import readable
from .coded_inspection import CodedLayerInspection, inspect_codes, read_bytes

# Bounds the 64-bit temporaries of counting, whatever the size of a matrix.
_WORDS_AT_ONCE = 1 << 22


class LayerInspection(Strict):
    """One layer of pairs.

    `shared_fraction` is of the elements of its pairs: those that both members keep; `kept_fraction` of their weights:
    those that survive in their own expert. `exponents` counts the words of gate, up and down of all slots by their
    stored exponent field; field 0 is the zero word. The last two are the manifest's, None where it has none;
    `estimated_loss` is also None without calibration.
    """

    layer: int
    slots: int
    pairs: int
    shared_fraction: float
    kept_fraction: float
    exponents: list[int]
    estimated_loss: float | None
    relative_error: float | None


class Inspection(Strict):
    """A packed checkpoint: layers of pairs, of coded experts, and those whose experts are as they were.

    `smallest_exponent` is the power of two of exponent field 1.
    """

    checkpoint: str
    format_version: int
    bits: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    max_expert_parallel: int
    packed_bytes: int
    total_bytes: int
    smallest_exponent: int
    provenance: Provenance
    has_manifest: bool
    layers: list[LayerInspection]
    coded_layers: list[CodedLayerInspection]
    plain_layers: list[int]

    @property
    def exponents(self) -> list[int]:
        """The counts of all layers together."""
        return [sum(counts) for counts in zip(*(layer.exponents for layer in self.layers), strict=True)]


def inspect_checkpoint(path: Path, progress: Progress) -> Inspection:
    """Reads every word of `path`, the three tensors of one slot at a time, and one coded expert of each layer.

    Raises:
        CheckpointError: it is not a whole packed checkpoint, or its manifest breaks the schema.
    """
    packed = PackedCheckpoint(path)
    quantization, tensors = packed.quantization, packed.checkpoint.tensors
    has_manifest = (path / MANIFEST_FILE).is_file()
    entries, coded_entries = _read_entries(packed) if has_manifest else ({}, {})
    sizes = {name: info.num_bytes for name, info in tensors.items() if parse_expert_name(name)}
    words = sum(size for name, size in sizes.items() if packed.coded(name) is None)
    total = words + read_bytes(packed)

    def advance(read: int) -> None:
        progress(read, total)

    counter = _WordCounter(packed.layout)
    return Inspection(
        checkpoint=readable(path),
        format_version=quantization.format_version,
        bits=quantization.bits,
        num_experts=quantization.num_experts,
        hidden_size=quantization.hidden_size,
        intermediate_size=quantization.intermediate_size,
        max_expert_parallel=quantization.max_expert_parallel,
        packed_bytes=sum(sizes.values()),
        total_bytes=packed.checkpoint.num_bytes,
        smallest_exponent=round(math.log2(packed.layout.smallest)),
        provenance=quantization.provenance,
        has_manifest=has_manifest,
        layers=[
            _inspect_layer(packed, slots, entries.get(slots.layer), counter, advance) for slots in quantization.layers
        ],
        coded_layers=[
            inspect_codes(packed, codes, coded_entries.get(codes.layer), advance) for codes in quantization.coded_layers
        ],
        plain_layers=quantization.plain_layers,
    )


def _read_entries(packed: PackedCheckpoint) -> tuple[dict[int, LayerEntry], dict[int, CodedLayerEntry]]:
    """What the manifest says of layers of pairs and of codes, by layer."""
    manifest = read_manifest(packed.checkpoint.path)
    entries = {entry.layer: entry for entry in manifest.layers}
    if packed.quantization.provenance.calibration is None:
        # Earlier versions recorded a loss here that is relative to no residual stream.
        entries = {layer: entry.model_copy(update={"estimated_loss": None}) for layer, entry in entries.items()}
    return entries, {entry.layer: entry for entry in manifest.coded_layers}


def _inspect_layer(
    packed: PackedCheckpoint,
    slots: LayerSlots,
    entry: LayerEntry | None,
    counter: "_WordCounter",
    advance: Callable[[int], None],
) -> LayerInspection:
    prefix, projections = packed.shape.experts_prefix(slots.layer), packed.shape.family.projections
    pairs, alone = counter.no_words(), counter.no_words()
    for slot in range(slots.num_slots):
        names = [packed_name(prefix, slots.first_member(slot), projection) for projection in projections]
        counts = pairs if slot < slots.pairs else alone
        for words in packed.checkpoint.read(names).values():
            counts += counter.count(words)
            advance(words.nbytes)
    statistics = counter.statistics(pairs)
    return LayerInspection(
        layer=slots.layer,
        slots=slots.num_slots,
        pairs=slots.pairs,
        shared_fraction=statistics.shared_fraction,
        kept_fraction=statistics.kept_fraction,
        exponents=counter.exponents(pairs + alone),
        estimated_loss=None if entry is None else entry.estimated_loss,
        relative_error=None if entry is None else entry.relative_error,
    )


class _WordCounter:
    """Counts words by their value, int64 (2 ** bits,), ascending; what a value means is looked up once."""

    def __init__(self, layout: WordLayout) -> None:
        info = torch.iinfo(layout.dtype)
        self._lowest = info.min
        values = torch.arange(info.min, info.max + 1, dtype=torch.int32)
        words = values.to(layout.dtype)
        self._held = [unpack(words, member, layout) != 0 for member in range(len(layout.mask_bits))]
        self._exponent = ((values & layout.magnitude_mask) >> layout.mantissa_bits).long()
        self._num_exponents = 1 << layout.exponent_bits

    def no_words(self) -> torch.Tensor:
        return torch.zeros(len(self._exponent), dtype=torch.int64)

    def count(self, words: torch.Tensor) -> torch.Tensor:
        counts = self.no_words()
        for part in words.flatten().split(_WORDS_AT_ONCE):
            counts += torch.bincount(part.to(torch.int32) - self._lowest, minlength=len(counts))
        return counts

    def statistics(self, counts: torch.Tensor) -> MergeStatistics:
        """The statistics of the words of pairs, without errors: the sources are not known here."""
        first, second = self._held
        return MergeStatistics(
            elements=int(counts.sum()),
            shared=int(counts[first & second].sum()),
            kept=int(counts[first].sum() + counts[second].sum()),
        )

    def exponents(self, counts: torch.Tensor) -> list[int]:
        """How many words have each exponent field."""
        histogram = torch.zeros(self._num_exponents, dtype=torch.int64)
        return histogram.index_add_(0, self._exponent, counts).tolist()
