"""Copying the tensors of coded experts into a layer's parameters: codes, codebooks and scales."""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..format import (
    CODEBOOK_SUFFIX,
    CODES_PER_GROUP,
    PACKED_SUFFIX,
    SCALE_SUFFIX,
    CodedShape,
    LayerCodes,
    num_words,
    pack_codes,
    unpack_codes,
)
from ..kernels import CodedMatrices
from .loader import ExpertLoader, Projection, Rank, fill


@dataclass(frozen=True)
class CodedPart:
    """What a rank holds of a layer of coded experts.

    Attributes:
        layer_name: names the layer's experts, as the prefix of their tensors.
        position: where an expert of this rank is in the parameters, by its id. Ids beyond those of `codes` are replicas
            for expert-parallel load balancing, which begin as copies of experts 0, 1 and so on.
        projections: by shard id.
        hidden_size: of the model; `intermediate_size` is of an expert. Both are those of the checkpoint.
    """

    layer_name: str
    codes: LayerCodes
    position: dict[int, int]
    projections: dict[str, Projection]
    hidden_size: int
    intermediate_size: int
    rank: Rank

    def source(self, expert: int) -> int:
        """The id that an expert's tensors are named after."""
        return expert % self.codes.num_experts

    def shape(self, expert: int, shard_id: str) -> CodedShape:
        """What the checkpoint has of an expert: of w2, or of w13 for the other shards."""
        make, widths = (
            (CodedShape.of_w2, self.codes.w2_bits) if shard_id == "w2" else (CodedShape.of_w13, self.codes.w13_bits)
        )
        return make(self.hidden_size, self.intermediate_size, widths[self.source(expert)])

    def widths(self, shard_id: str) -> list[int]:
        """The widths of this rank's codes, in the order of the parameters."""
        return [self.shape(expert, shard_id).bits for expert in sorted(self.position, key=self.position.__getitem__)]


class CodedExpertLoader(ExpertLoader):
    """Loads one kind of tensor of a layer's coded experts."""

    suffix: str
    dtype: torch.dtype

    def __init__(self, part: CodedPart, failed: Callable[[], None] = lambda: None) -> None:
        super().__init__(part.layer_name, self.suffix, part.projections, part.position, failed)
        self._part = part

    def num_loaded(self, shards: tuple[str, ...]) -> int:
        """How many elements of the parameter of these shards come from the checkpoint; the rest is padding."""
        return sum(
            math.prod(self._local_shape(expert, shard))
            for expert in self._part.position
            for shard in shards
            if shard in self.shards
        )

    @abstractmethod
    def _shape(self, expert: int, shard_id: str) -> tuple[int, ...]:
        """The tensor's shape in the checkpoint."""

    @abstractmethod
    def _local_shape(self, expert: int, shard_id: str) -> tuple[int, ...]:
        """The shape of this rank's part."""

    def _why_not(self, expert: int, shard_id: str) -> str | None:
        if shard_id not in self.shards:
            return "gate and up share the one that is named after gate"
        num_experts = self._part.codes.num_experts
        there = expert < num_experts or expert in self._part.position
        return None if there else f"this layer has experts 0 to {num_experts - 1}"

    def _expected(self, expert: int, shard_id: str) -> tuple[torch.dtype, tuple[int, ...]]:
        return self.dtype, self._shape(expert, shard_id)

    def _name(self, expert: int, shard_id: str) -> str:
        return super()._name(self._part.source(expert), shard_id)


class CodesLoader(CodedExpertLoader):
    """Loads `weight_packed`: bit streams of codes, of this rank's rows of gate and up and columns of down."""

    suffix, dtype, shards = PACKED_SUFFIX, torch.int32, ("w1", "w2")

    def __init__(
        self, part: CodedPart, w13: CodedMatrices, w2: CodedMatrices, failed: Callable[[], None] = lambda: None
    ) -> None:
        """`w13` and `w2` are what the engine has allocated; only how they are laid out is kept, not their memory."""
        super().__init__(part, failed)
        self._layout = {"w1": _without_memory(w13), "w2": _without_memory(w2)}

    def _shape(self, expert: int, shard_id: str) -> tuple[int, ...]:
        return self._part.shape(expert, shard_id).packed

    def _local_shape(self, expert: int, shard_id: str) -> tuple[int, ...]:
        shape, rank = self._part.shape(expert, shard_id), self._part.rank
        if shard_id == "w2":
            return shape.rows, num_words(shape.columns // rank.count, shape.bits)
        return shape.rows // rank.count, num_words(shape.columns, shape.bits)

    def _place(self, param: torch.nn.Parameter, tensor: torch.Tensor, shard_id: str, expert: int) -> None:
        shape, rank = self._part.shape(expert, shard_id), self._part.rank
        target = replace(self._layout[shard_id], codes=param.data).packed(self._part.position[expert])
        if param.is_meta:
            # A reload counts every copy that is made meanwhile, and cutting makes some of its own.
            part = target.new_empty(self._local_shape(expert, shard_id))
        elif shard_id == "w2":
            part = cut_columns(tensor, shape.bits, rank.part(shape.columns))
        else:
            part = tensor[rank.part(shape.rows)]
        fill(target, part)


class CodebookLoader(CodedExpertLoader):
    """Loads `weight_codebook`, which every tensor-parallel rank needs whole."""

    suffix, dtype, shards = CODEBOOK_SUFFIX, torch.bfloat16, ("w1", "w2")

    def _shape(self, expert: int, shard_id: str) -> tuple[int, ...]:
        return self._part.shape(expert, shard_id).codebook

    _local_shape = _shape

    def _place(self, param: torch.nn.Parameter, tensor: torch.Tensor, shard_id: str, expert: int) -> None:
        fill(param.data[self._part.position[expert]], tensor)


class ScaleLoader(CodedExpertLoader):
    """Loads `weight_scale`: those of gate above those of up, those of down's even rows above those of its odd ones."""

    suffix, dtype = SCALE_SUFFIX, torch.bfloat16

    def _shape(self, expert: int, shard_id: str) -> tuple[int, ...]:
        return (self._part.hidden_size if shard_id == "w2" else self._part.intermediate_size,)

    def _local_shape(self, expert: int, shard_id: str) -> tuple[int, ...]:
        (size,) = self._shape(expert, shard_id)
        return (size if shard_id == "w2" else size // self._part.rank.count,)

    def _place(self, param: torch.nn.Parameter, tensor: torch.Tensor, shard_id: str, expert: int) -> None:
        first, second = param.data[self._part.position[expert]].split(1)
        if shard_id == "w2":
            fill(first, tensor[None, 0::2])
            fill(second, tensor[None, 1::2])
        else:
            fill(first if shard_id == "w1" else second, tensor[None, self._part.rank.part(len(tensor))])


def cut_columns(words: torch.Tensor, bits: int, columns: slice) -> torch.Tensor:
    """The bit stream of some of the columns.

    Where they begin on a word's boundary the last group may go on with the columns that follow, which padding allows:
    an engine multiplies it by activations that are zero.

    Args:
        words: int32, as of `pack_codes`.
        columns: of the codes, two weights each.

    Returns:
        int32 (rows, num_words(len(columns), bits)).
    """
    first, offset = divmod(columns.start, CODES_PER_GROUP)
    groups = words[:, first * bits : num_words(columns.stop, bits)]
    if not offset:
        return groups
    codes = unpack_codes(groups, bits, groups.shape[1] // bits * CODES_PER_GROUP)
    return pack_codes(codes[:, offset : offset + columns.stop - columns.start], bits, zero=0)


def _without_memory(matrices: CodedMatrices) -> CodedMatrices:
    """The same on the meta device, but for the index, which lies on the CPU."""
    return CodedMatrices(
        codes=matrices.codes.to("meta"),
        index=matrices.index.cpu(),
        codebook=matrices.codebook.to("meta"),
        scale=matrices.scale.to("meta"),
    )
