"""The tensors of coded experts: which there are, and what they stand for."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from vllm_puzzle.format import (
    CODES_PER_GROUP,
    CodedShape,
    ExpertTensor,
    LayerCodes,
    coded_tensors,
    decode,
    join_rows,
    split_rows,
    unpack_codes,
)

from .shape import MoEShape
from .shards import TensorLayout


def lay_out_coded(shape: MoEShape, codes: LayerCodes, expert: int) -> list[TensorLayout]:
    """The tensors of a coded expert, in the order of `coded_tensors`."""
    sizes = shape.hidden_size, shape.intermediate_size
    w13, w2 = CodedShape.of_w13(*sizes, codes.w13_bits[expert]), CodedShape.of_w2(*sizes, codes.w2_bits[expert])
    gate, up, down = ((shape.projection_shape(projection)[0],) for projection in shape.family.projections)
    kinds = (
        ("I32", 4, w13.packed),
        ("BF16", 2, w13.codebook),
        ("BF16", 2, gate),
        ("BF16", 2, up),
        ("I32", 4, w2.packed),
        ("BF16", 2, w2.codebook),
        ("BF16", 2, down),
    )
    names = coded_tensors(shape.experts_prefix(codes.layer), expert, shape.family.projections)
    return [
        TensorLayout(tensor.name, dtype, size, width * torch.Size(size).numel())
        for tensor, (dtype, width, size) in zip(names, kinds, strict=True)
    ]


@dataclass(frozen=True)
class StoredMatrix:
    """Gate and up of a coded expert, or its down, as they are stored.

    Attributes:
        names: of its tensors: the codes, the codebook, and the scales of gate and of up, or of down.
        sources: the names of the matrices that it stands for, gate and up, or down.
        bits: the width of a code.
        columns: how many codes of a row stand for weights.
        num_rows: of each matrix.
    """

    names: tuple[str, ...]
    sources: tuple[str, ...]
    bits: int
    columns: int
    num_rows: int

    def codes(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Every code, uint8 (rows, columns padded to whole groups), of the tensors by their names."""
        padded = -(-self.columns // CODES_PER_GROUP) * CODES_PER_GROUP
        return unpack_codes(tensors[self.names[0]], self.bits, padded)

    def codebook(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Bfloat16 (2 ** bits, 2)."""
        return tensors[self.names[1]]

    def scales(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Bfloat16 (2, rows of codes); zero for the row that an odd number of rows lacks."""
        scales = [tensors[name] for name in self.names[2:]]
        return torch.stack(scales) if len(scales) == 2 else split_rows(scales[0][:, None])[..., 0]

    def halves(self, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
        """Matrices in the order of `sources` as (2, rows, columns): what the two weights of a code are of."""
        return torch.stack(list(matrices)) if len(matrices) == 2 else split_rows(matrices[0])

    def decoded(self, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """The matrices, float32, in the order of `sources`."""
        codes = self.codes(tensors)[:, : self.columns]
        halves = decode(codes, self.codebook(tensors), self.scales(tensors))
        return list(halves) if len(self.sources) == 2 else [join_rows(halves, self.num_rows)]


def stored_matrices(shape: MoEShape, codes: LayerCodes, expert: int) -> tuple[StoredMatrix, StoredMatrix]:
    """A coded expert's gate and up, and its down."""
    names = [tensor.name for tensor in coded_tensors(*_place(shape, codes, expert))]
    gate, up, down = shape.expert_names(codes.layer, expert)
    hidden_size, intermediate_size = shape.hidden_size, shape.intermediate_size
    w13_bits, w2_bits = codes.w13_bits[expert], codes.w2_bits[expert]
    return (
        StoredMatrix(tuple(names[:4]), (gate, up), w13_bits, hidden_size, intermediate_size),
        StoredMatrix(tuple(names[4:]), (down,), w2_bits, intermediate_size, hidden_size),
    )


def stored_matrix(shape: MoEShape, codes: LayerCodes, tensor: ExpertTensor) -> StoredMatrix:
    """The matrix whose codes, codebook or scales a tensor is."""
    return next(each for each in stored_matrices(shape, codes, tensor.expert) if tensor.name in each.names)


def _place(shape: MoEShape, codes: LayerCodes, expert: int) -> tuple[str, int, tuple[str, str, str]]:
    return shape.experts_prefix(codes.layer), expert, shape.family.projections


def code_bits(codes: LayerCodes) -> float:
    """The bits of codes that a layer's weights have on average: gate and up are two thirds of them."""
    return (2 * sum(codes.w13_bits) + sum(codes.w2_bits)) / (6 * codes.num_experts)


def stored_bits(shape: MoEShape, layers: Sequence[LayerCodes]) -> float:
    """The bits that a weight of these layers' experts takes on average, with codebooks and scales."""
    stored = sum(
        tensor.num_bytes
        for codes in layers
        for expert in range(codes.num_experts)
        for tensor in lay_out_coded(shape, codes, expert)
    )
    return 8 * stored / (3 * shape.hidden_size * shape.intermediate_size * shape.num_experts * len(layers))


def describe_widths(codes: LayerCodes) -> str:
    """How many experts have codes of which widths, as `6 x 4, 2 x 5` or, where down's differ, `8 x 4/5`."""
    pairs = zip(codes.w13_bits, codes.w2_bits, strict=True)
    counts = Counter(str(w13) if w13 == w2 else f"{w13}/{w2}" for w13, w2 in pairs)
    return ", ".join(f"{count} x {width}" for width, count in sorted(counts.items()))
