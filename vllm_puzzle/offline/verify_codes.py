"""Comparing coded experts with their source: what can be said of single codes, and of what an expert computes."""

from collections.abc import Sequence

import torch

from vllm_puzzle.format import LayerCodes

from .checkpoints.checkpoint import Checkpoint
from .checkpoints.coded import StoredMatrix, stored_matrices
from .checkpoints.packed import PackedCheckpoint
from .defaults import CODE_RULE
from .errors import CheckpointError
from .merging.likeness import measure_likeness

# By the width of a code: a cosine that unrelated experts do not reach, and that coding leaves even where few inputs
# outweigh all others, since then the random ones that are tried here say little.
_LEAST_LIKENESS = {4: 0.2, 5: 0.3, 6: 0.4, 8: 0.5}

# Distances that are computed at once, in elements.
_ELEMENTS_AT_ONCE = 1 << 22
# Of float32, by which the converter's nearest point may be another one than here.
_ROUNDING = 1e-5

_AGAIN = "convert the source again"


def check_coded_matrix(packed: PackedCheckpoint, matrix: StoredMatrix, sources: Sequence[torch.Tensor]) -> None:
    """Raises CheckpointError for the first number of a coded matrix that the rule cannot have written.

    Without calibration every code is that of the point nearest to its two weights. With it a code makes up for the
    errors of others, so none follows from its own weights: see `check_coded_expert`.

    Args:
        sources: the matrices that it stands for, in the order of `matrix.sources`.
    """
    where, (name, _, *scale_names) = packed.checkpoint.path, matrix.names
    _check_rule(packed)
    tensors = packed.read_coded(matrix)
    codes, codebook, scales = matrix.codes(tensors), matrix.codebook(tensors), matrix.scales(tensors)
    for scale_name in scale_names:
        if (tensors[scale_name] < 0).any():
            index = int((tensors[scale_name] < 0).nonzero()[0])
            raise CheckpointError(
                f"{where}: {scale_name}[{index}] is {tensors[scale_name][index].item():g}, and a scale is never below "
                f"zero; {_AGAIN}"
            )
    padding = codebook[codes[:, matrix.columns :].int()].any(dim=2)
    if padding.any():
        row, column = padding.nonzero()[0].tolist()
        raise CheckpointError(
            f"{where}: {name} has code {int(codes[row, matrix.columns + column])} in the padding of row {row}, which "
            f"does not stand for zeros; {_AGAIN}"
        )
    if packed.quantization.provenance.calibration is None:
        _check_nearest(packed, matrix, codes[:, : matrix.columns], (codebook, scales), matrix.halves(sources))


def check_coded_expert(original: Checkpoint, packed: PackedCheckpoint, codes: LayerCodes, expert: int) -> None:
    """Raises CheckpointError where what a coded expert computes is nothing like its source."""
    names = packed.shape.expert_names(codes.layer, expert)
    found: list[torch.Tensor] = []
    for matrix in stored_matrices(packed.shape, codes, expert):
        found += matrix.decoded(packed.read_coded(matrix))
    likeness = measure_likeness(list(original.read(names).values()), found, packed.activation)
    width = min(codes.w13_bits[expert], codes.w2_bits[expert])
    if not likeness >= _LEAST_LIKENESS[width]:
        raise CheckpointError(
            f"{packed.checkpoint.path}: {names[0].removesuffix('.weight')} and its up and down, in codes of {width} "
            f"bits, have a cosine of {likeness:.2f} to the source's expert in their output on random inputs; "
            f"{_LEAST_LIKENESS[width]} is the least that coding leaves, so {_AGAIN}"
        )


def _check_rule(packed: PackedCheckpoint) -> None:
    rule = packed.quantization.provenance.rule
    if rule != CODE_RULE:
        raise CheckpointError(
            f"{packed.checkpoint.path} was coded by rule {rule}, this vllm-puzzle knows {CODE_RULE}; verify it with "
            f"the release that wrote it"
        )


def _check_nearest(
    packed: PackedCheckpoint,
    matrix: StoredMatrix,
    codes: torch.Tensor,
    points: tuple[torch.Tensor, torch.Tensor],
    halves: torch.Tensor,
) -> None:
    """Raises CheckpointError for the first code whose point is not the nearest one; `points` are with their scales."""
    codebook, scales = (values.float() for values in points)
    num_rows, num_columns = codes.shape
    step = max(1, _ELEMENTS_AT_ONCE // (num_columns * len(codebook)))
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        weights = halves[:, rows].float()
        # (2, rows, points), and the squared distance of every weight pair to each: (rows, columns, points).
        values = scales[:, rows, None] * codebook.T[:, None]
        distances = sum((weights[half][..., None] - values[half][:, None]).square() for half in (0, 1))
        assert isinstance(distances, torch.Tensor)
        chosen = distances.gather(2, codes[rows].long()[..., None])[..., 0]
        excess = chosen - distances.amin(dim=2)
        wrong = excess > _ROUNDING * (chosen + weights.square().sum(dim=0))
        if wrong.any():
            row, column = wrong.nonzero()[0].tolist()
            code, pair = int(codes[start + row, column]), weights[:, row, column].tolist()
            raise CheckpointError(
                f"{packed.checkpoint.path}: {matrix.names[0]} has code {code} in row {start + row}, column {column}, "
                f"which stands for {values[:, row, code].tolist()}; another point of {matrix.names[1]} is nearer to "
                f"the source's {pair}"
            )
