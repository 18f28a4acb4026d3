"""The coded experts of one layer: how wide their codes are, and what that makes of their tensors."""

from dataclasses import dataclass

from pydantic import model_validator

from .codes import CODE_BITS, num_words
from .strict import Strict


class LayerCodes(Strict):
    """A layer of coded experts.

    `w13_bits` and `w2_bits` are the widths of each expert's codes, of gate and up and of down, in the order of ids.
    """

    layer: int
    w13_bits: list[int]
    w2_bits: list[int]

    @model_validator(mode="after")
    def _check(self) -> "LayerCodes":
        if self.layer < 0:
            raise ValueError(f"layer {self.layer} is negative")
        if len(self.w13_bits) != len(self.w2_bits):
            raise ValueError(
                f"layer {self.layer}: `w13_bits` is of {len(self.w13_bits)} experts, `w2_bits` of {len(self.w2_bits)}"
            )
        unknown = sorted({*self.w13_bits, *self.w2_bits} - set(CODE_BITS))
        if unknown:
            raise ValueError(f"layer {self.layer}: codes of {unknown[0]} bits are not known; they have {CODE_BITS}")
        return self

    @classmethod
    def even(cls, layer: int, num_experts: int, bits: int) -> "LayerCodes":
        """A layer whose codes are all `bits` wide."""
        return cls(layer=layer, w13_bits=[bits] * num_experts, w2_bits=[bits] * num_experts)

    @property
    def num_experts(self) -> int:
        return len(self.w13_bits)

    @property
    def is_even(self) -> bool:
        """Whether every expert takes as many bytes as every other, as expert-parallel load balancing needs it."""
        return len(set(self.w13_bits)) <= 1 and len(set(self.w2_bits)) <= 1


@dataclass(frozen=True)
class CodedShape:
    """The shapes of one coded matrix, gate and up together or down alone.

    `rows` and `columns` are those of its codes, two weights each.
    """

    rows: int
    columns: int
    bits: int

    @classmethod
    def of_w13(cls, hidden_size: int, intermediate_size: int, bits: int) -> "CodedShape":
        return cls(intermediate_size, hidden_size, bits)

    @classmethod
    def of_w2(cls, hidden_size: int, intermediate_size: int, bits: int) -> "CodedShape":
        return cls((hidden_size + 1) // 2, intermediate_size, bits)

    @property
    def packed(self) -> tuple[int, int]:
        """The shape of `weight_packed`, int32."""
        return self.rows, num_words(self.columns, self.bits)

    @property
    def codebook(self) -> tuple[int, int]:
        """The shape of `weight_codebook`, bfloat16."""
        return 1 << self.bits, 2

    @property
    def num_bytes(self) -> int:
        """Bytes of codes, codebook and the two rows of scales."""
        return 4 * self.packed[0] * self.packed[1] + 4 * self.codebook[0] + 4 * self.rows
