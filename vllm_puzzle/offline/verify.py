"""Comparing a packed checkpoint with its source: nothing else changed, and experts are what their rule allows."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_puzzle.format import find_invalid_word, is_packed, nearest_magnitude, packed_name, unpack

from .checkpoints.checkpoint import Checkpoint, SourceHash
from .checkpoints.manifest import MANIFEST_FILE, read_manifest, sha256_of
from .checkpoints.model_config import read_json
from .checkpoints.packed import PackedCheckpoint
from .checkpoints.source import SourceCheckpoint
from .errors import CheckpointError
from .merging.likeness import measure_likeness
from .merging.rules import RULES, Rule
from .progress import Progress
from .verify_codes import check_coded_expert, check_coded_matrix

# A cosine that unrelated experts do not reach. It is low because an expert that no token reached may lose all but that
# to its mate.
_LEAST_LIKENESS = 0.03

_GIVE_SOURCE = "give the checkpoint that was converted, as it was then"


@dataclass(frozen=True)
class VerifyResult:
    """How many tensors are the source's bit for bit, and how many packed ones are what their rule allows."""

    untouched: int
    packed: int


def verify(source: Path, packed_path: Path, progress: Progress) -> VerifyResult:
    """Compares every tensor of a packed checkpoint with its source, and every file with its manifest.

    Raises:
        CheckpointError: `source` is not what was converted, or the first difference: a tensor outside the experts that
            changed, is missing or is new, a word, a codebook or a scale that no converter writes, an element or an
            expert that the rule could not have made from its source, or a shard with another checksum than the
            manifest's.
    """
    original, packed = _open(source, packed_path)
    _check_same_model(original, packed)
    try:
        result = _compare(original, packed, progress)
    except CheckpointError:
        # It is the source's whole content that is compared here, so only where something differs.
        _check_same_content(original, packed)
        raise
    _check_files(packed)
    return result


def _compare(original: SourceCheckpoint, packed: PackedCheckpoint, progress: Progress) -> VerifyResult:
    """Compares every tensor; raises CheckpointError for the first difference."""
    source, path = original.path, packed.checkpoint.path
    untouched = packed_count = 0
    seen: set[str] = set()
    for name in sorted(packed.checkpoint.tensors):
        members = packed.members(name)
        names = [name] if members is None else members
        for source_name in names:
            if source_name not in original.tensors:
                raise CheckpointError(f"{path}: {name} has no counterpart {source_name} in {source}")
        sources = list(original.read(names).values())
        if members is None:
            _check_untouched(name, packed.checkpoint.read([name])[name], sources[0], path)
            untouched += 1
        else:
            _check_packed(name, sources, packed)
            packed_count += 1
        seen.update(names)
        progress(packed.checkpoint.tensors[name].num_bytes, packed.checkpoint.num_bytes)
    _check_functions(original, packed)
    missing = sorted(set(original.tensors) - seen)
    if missing:
        raise CheckpointError(f"{path} lacks {len(missing)} tensors of {source}, the first is {missing[0]}")
    return VerifyResult(untouched, packed_count)


def _open(source: Path, packed: Path) -> tuple[SourceCheckpoint, PackedCheckpoint]:
    try:
        return SourceCheckpoint(source), PackedCheckpoint(packed)
    except CheckpointError:
        _check_order(source, packed)
        raise


def _check_order(source: Path, packed: Path) -> None:
    """Raises CheckpointError where the two were given the other way round."""
    first, second = (os.path.isdir(path) and is_packed(read_json(path / "config.json")) for path in (source, packed))
    if first and not second:
        raise CheckpointError(
            f"{source} is packed and {packed} is not; the source comes first: vllm-puzzle verify {packed} {source}"
        )


def _check_same_model(original: SourceCheckpoint, packed: PackedCheckpoint) -> None:
    """Raises CheckpointError where the two configs are of different models."""
    shapes = [{**vars(shape), "family": shape.family.architecture} for shape in (original.shape, packed.shape)]
    for name, stated in shapes[0].items():
        if stated != shapes[1][name]:
            raise CheckpointError(
                f"{original.path} is not what {packed.checkpoint.path} was converted from: its config.json describes "
                f"{name} {stated}, the packed one {shapes[1][name]}; {_GIVE_SOURCE}"
            )


def _check_same_content(original: SourceCheckpoint, packed: PackedCheckpoint) -> None:
    """Raises CheckpointError where the tensors of the source are not those that were converted."""
    found, recorded = SourceHash(), packed.quantization.provenance.source_sha256
    for name in original.tensors:
        found.add(name, original.read([name])[name])
    if found.hexdigest() != recorded:
        raise CheckpointError(
            f"{original.path} is not what {packed.checkpoint.path} was converted from: the SHA-256 of its tensors is "
            f"{found.hexdigest()}, and {recorded} is recorded as the source's; {_GIVE_SOURCE}"
        )


def _check_files(packed: PackedCheckpoint) -> None:
    """Raises CheckpointError where a shard is not, to the byte, what the converter wrote."""
    path = packed.checkpoint.path
    manifest = read_manifest(path)
    shards = {info.shard for info in packed.checkpoint.tensors.values()}
    for entry in manifest.shards:
        if entry.file not in shards:
            raise CheckpointError(
                f"{path / MANIFEST_FILE} names {entry.file}, which the index does not; {packed.checkpoint.remedy}"
            )
        if sha256_of(path / entry.file) != entry.sha256:
            raise CheckpointError(
                f"{path / entry.file} has another SHA-256 than {MANIFEST_FILE} says; {packed.checkpoint.remedy}"
            )
    unnamed = sorted(shards - {entry.file for entry in manifest.shards})
    if unnamed:
        raise CheckpointError(f"{path / MANIFEST_FILE} says nothing of {unnamed[0]}; {packed.checkpoint.remedy}")


def _check_untouched(name: str, tensor: torch.Tensor, source: torch.Tensor, path: Path) -> None:
    if (tensor.dtype, tensor.shape) != (source.dtype, source.shape):
        raise CheckpointError(
            f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}, the source's is {source.dtype} "
            f"{list(source.shape)}"
        )
    # Compared as bytes, so that a NaN equals itself and -0.0 does not equal 0.0.
    if not torch.equal(tensor.flatten().view(torch.uint8), source.flatten().view(torch.uint8)):
        raise CheckpointError(
            f"{path}: {name} differs from the source's, though nothing outside the experts may change"
        )


def _check_packed(name: str, sources: list[torch.Tensor], packed: PackedCheckpoint) -> None:
    coded = packed.coded(name)
    if coded is None:
        _check_words(name, packed.checkpoint.read([name])[name], sources, packed)
    elif sources:
        # Its codebook and scales are compared with its codes.
        check_coded_matrix(packed, coded, sources)


def _check_words(name: str, words: torch.Tensor, sources: list[torch.Tensor], packed: PackedCheckpoint) -> None:
    path = packed.checkpoint.path
    invalid = find_invalid_word(words, packed.layout)
    if invalid is not None:
        raise CheckpointError(f"{path}: {name}{list(invalid)} is {words[invalid].item()}, a word that is never written")
    decoded = [unpack(words, member, packed.layout) for member in range(len(sources))]
    floats = [source.float() for source in sources]
    allowed = _allowed(decoded, floats, packed, name)
    if allowed is not None and not allowed.all():
        index = tuple((~allowed).nonzero()[0].tolist())
        raise CheckpointError(
            f"{path}: {name}{list(index)} decodes to {[member[index].item() for member in decoded]}, which rule "
            f"{packed.quantization.provenance.rule} cannot make from {[source[index].item() for source in floats]}"
        )


def _rule_of(packed: PackedCheckpoint) -> Rule:
    name = packed.quantization.provenance.rule
    if name not in RULES:
        raise CheckpointError(
            f"{packed.checkpoint.path} was merged by rule {name}, this vllm-puzzle knows {list(RULES)}; verify it with "
            f"the release that wrote it"
        )
    return RULES[name]


def _leaves_traces(packed: PackedCheckpoint) -> bool:
    """Whether a merged element follows from the two at its place in the source."""
    return _rule_of(packed).leaves_traces and not packed.quantization.provenance.align


def _check_functions(original: Checkpoint, packed: PackedCheckpoint) -> None:
    """Checks what experts compute, where single elements do not tell."""
    quantization = packed.quantization
    for slots in quantization.layers:
        for slot in range(slots.pairs):
            if not _leaves_traces(packed):
                _check_function(original, packed, slots.layer, slots.members(slot))
    for codes in quantization.coded_layers:
        for expert in range(codes.num_experts):
            if quantization.provenance.calibration is not None:
                check_coded_expert(original, packed, codes, expert)


def _check_function(original: Checkpoint, packed: PackedCheckpoint, layer: int, members: tuple[int, ...]) -> None:
    """Raises CheckpointError where a merged expert's output on random inputs is nothing like that of its source."""
    shape, path = packed.shape, packed.checkpoint.path
    prefix = shape.experts_prefix(layer)
    names = [packed_name(prefix, members[0], projection) for projection in shape.family.projections]
    words = packed.checkpoint.read(names)
    for member, expert in enumerate(members):
        sources = original.read(shape.expert_names(layer, expert))
        merged = [unpack(words[name], member, packed.layout) for name in names]
        likeness = measure_likeness(list(sources.values()), merged, packed.activation)
        if not likeness >= _LEAST_LIKENESS:
            raise CheckpointError(
                f"{path}: {names[0].removesuffix('.weight_packed')} and its up and down hold expert {expert} as member "
                f"{member}, but on random inputs their output has a cosine of {likeness:.2f} to that of the source's "
                f"expert; {_LEAST_LIKENESS} is the least that merging leaves, so convert the source again"
            )


def _allowed(
    decoded: list[torch.Tensor], sources: list[torch.Tensor], packed: PackedCheckpoint, name: str
) -> torch.Tensor | None:
    """Which elements the rule can have made, bool (rows, columns); None where it leaves no trace in single elements."""
    layout = packed.layout
    alone = [nearest_magnitude(source, layout, name) for source in sources]
    if len(sources) == 1:
        same_sign = (decoded[0] == 0) | (torch.signbit(decoded[0]) == torch.signbit(sources[0]))
        return same_sign & (decoded[0].abs() == alone[0])
    if not _leaves_traces(packed):
        return None
    held = [member != 0 for member in decoded]
    # Members that share an element hold the mean, or with weights something between; a member that has it to itself
    # holds its own magnitude; an element that nobody holds was too small for one of those to be stored.
    both, none = held[0] & held[1], ~(held[0] | held[1])
    low, high = _rule_of(packed).shared_magnitudes(sources, layout, name)
    allowed = both & (low <= decoded[0].abs()) & (decoded[0].abs() <= high)
    allowed |= none & ((low == 0) | (alone[0] == 0) | (alone[1] == 0))
    for member, source in enumerate(sources):
        allowed |= held[member] & ~both & (decoded[member].abs() == alone[member])
        allowed &= ~held[member] | (torch.signbit(decoded[member]) == torch.signbit(source))
    return allowed
