"""How a product is cut into programs: what its kernel is compiled for."""

from dataclasses import dataclass
from typing import Any, Self

import triton.language as tl

from .decode import Decoder
from .target import INTERPRETED


@dataclass(frozen=True, eq=False)
class Tile(str):
    """The compile-time side of one grouped product, as one argument of its kernel.

    It is the text of its fields: a string is what Triton can hash, and write as JSON where a hook watches compilations,
    as vLLM's does (vllm/utils/jit_monitor.py).

    Attributes:
        k: the length of the sums, hidden_size for gate-up and intermediate_size for down.
        rows: the rows of the result, intermediate_size for gate-up and hidden_size for down.
        members: 2, one program serves both members of a slot; 1, each member has programs of its own.
        block_rows: packed rows a program reads; in gate-up half of them are gate rows and half are up rows.
        block_tokens: tokens of each member that a program multiplies.
        block_k: the step of the main loop.
        split_k: programs that share a sum.
        num_stages: depth of the pipeline of asynchronous loads.
        weights_first: weights are the first operand of the tensor cores' product, tokens the second.
        decoder: from words to the activations' dtype.
    """

    k: int
    rows: int
    members: int
    block_rows: int
    block_tokens: int
    block_k: int
    split_k: int
    num_stages: int
    weights_first: bool
    decoder: Decoder

    def __new__(cls, **fields: Any) -> Self:
        return super().__new__(cls, repr(fields))

    @property
    def dtype(self) -> tl.dtype:
        """The dtype of the activations."""
        return self.decoder.dtype

    @property
    def dot_dtype(self) -> tl.dtype:
        """The dtype of the operands of tl.dot: the interpreter would multiply the bits of bfloat16 as integers."""
        return tl.float32 if INTERPRETED else self.dtype

    @property
    def scale(self) -> float:
        """What an accumulator of decoded weights is multiplied by."""
        return 2.0**-self.decoder.scale_exponent

    @property
    def part_k(self) -> int:
        """The part of k that one of split_k programs sums, a multiple of block_k."""
        steps = -(-self.k // self.block_k)
        return -(-steps // self.split_k) * self.block_k
