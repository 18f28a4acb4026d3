"""What the layers of coded experts hold: how wide codes are, and what one expert's codebooks look like."""

from collections.abc import Callable, Iterator
from typing import Literal

import torch

from vllm_puzzle.format import LayerCodes, Strict

from ..checkpoints.coded import code_bits, lay_out_coded, stored_bits, stored_matrices
from ..checkpoints.manifest import CodedLayerEntry
from ..checkpoints.packed import PackedCheckpoint

SHOWN_EXPERT = 0
"""Whose codebooks are shown: any other expert's would do as well, and all are too many."""


class Codebook(Strict):
    """The points of one coded matrix, gate and up or down, and how many of its codes stand for each."""

    matrix: Literal["gate and up", "down"]
    points: list[tuple[float, float]]
    counts: list[int]


class CodedLayerInspection(Strict):
    """One layer of coded experts.

    `w13_bits` and `w2_bits` are the widths of each expert's codes. `bits` are those of codes a weight, `stored_bits`
    count codebooks and scales too. The codebooks are those of expert SHOWN_EXPERT. The last two are the manifest's,
    None where it has none; `estimated_loss` is also None where it was not estimated, and without calibration.
    """

    layer: int
    w13_bits: list[int]
    w2_bits: list[int]
    bits: float
    stored_bits: float
    codebooks: list[Codebook]
    estimated_loss: float | None
    relative_error: float | None

    @property
    def codes(self) -> LayerCodes:
        return LayerCodes(layer=self.layer, w13_bits=self.w13_bits, w2_bits=self.w2_bits)


def read_bytes(packed: PackedCheckpoint) -> int:
    """The bytes that `inspect_codes` reads in all layers."""
    return sum(
        tensor.num_bytes
        for codes in packed.quantization.coded_layers
        for tensor in lay_out_coded(packed.shape, codes, SHOWN_EXPERT)
    )


def inspect_codes(
    packed: PackedCheckpoint, codes: LayerCodes, entry: CodedLayerEntry | None, advance: Callable[[int], None]
) -> CodedLayerInspection:
    """Reads one expert of a layer; `advance` is told of the bytes."""
    return CodedLayerInspection(
        layer=codes.layer,
        w13_bits=codes.w13_bits,
        w2_bits=codes.w2_bits,
        bits=code_bits(codes),
        stored_bits=stored_bits(packed.shape, [codes]),
        codebooks=list(_codebooks(packed, codes, advance)),
        estimated_loss=None if entry is None else entry.estimated_loss,
        relative_error=None if entry is None else entry.relative_error,
    )


def _codebooks(packed: PackedCheckpoint, codes: LayerCodes, advance: Callable[[int], None]) -> Iterator[Codebook]:
    kinds: tuple[Literal["gate and up", "down"], ...] = ("gate and up", "down")
    for kind, matrix in zip(kinds, stored_matrices(packed.shape, codes, SHOWN_EXPERT), strict=True):
        tensors = packed.read_coded(matrix)
        used = matrix.codes(tensors)[:, : matrix.columns].flatten().to(torch.int32)
        yield Codebook(
            matrix=kind,
            points=[(x, y) for x, y in matrix.codebook(tensors).tolist()],
            counts=torch.bincount(used, minlength=1 << matrix.bits).tolist(),
        )
        advance(sum(tensor.nbytes for tensor in tensors.values()))
