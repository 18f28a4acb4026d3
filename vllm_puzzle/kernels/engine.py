"""What an engine is: all that the operator, the choice of an engine and the plugin know of one."""

import math
from collections.abc import Sequence
from typing import Protocol

import torch

from vllm_puzzle.format import WORD16, WordLayout

from .coded import CodedMatrices, allocate_matrices
from .errors import EngineError

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""x, w13, w2, slot_of_expert, topk_weights and topk_ids of `packed_moe`."""

Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, str, bool]
"""The arguments of `packed_moe` but the engine's name. Passed one by one: to bundle them costs a CPU 0.6 us a call."""

CodedTensors = tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]
"""x, the four tensors of w13 and of w2, expert_map, topk_weights and topk_ids of `coded_moe`."""

CodedArguments = tuple[*CodedTensors, str, bool]
"""The arguments of `coded_moe` but the engine's name."""


class Engine(Protocol):
    """A way to compute `packed_moe`, and perhaps `coded_moe`: a frozen object in `registry.ENGINES`.

    The defaults are those of an engine that reads words in the order in which checkpoints store them, and no codes.
    """

    @property
    def name(self) -> str:
        """What `packed_moe` is called with, and what the log shows."""
        ...

    @property
    def family(self) -> str:
        """The value of $VLLM_PUZZLE_ENGINE that asks for it; the engines of a family are for different processors."""
        ...

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes of activations that it computes."""
        ...

    @property
    def layouts(self) -> tuple[WordLayout, ...]:
        """The words that it reads."""
        return (WORD16,)

    @property
    def reads_codes(self) -> bool:
        """Whether it computes `coded_moe`."""
        return False

    @property
    def multiple(self) -> int:
        """The rows of gate, up and down and the columns of w13 and w2 are zero-padded to a multiple of this."""
        return 1

    @property
    def can_be_captured(self) -> bool:
        """Whether a call waits for nothing, so that a CUDA graph can hold it."""
        return True

    def suits(self, device: torch.device) -> bool:
        """Whether $VLLM_PUZZLE_ENGINE=auto takes this family on `device`, if no family before it does."""
        ...

    def choose(self, device: torch.device, dtype: torch.dtype) -> "Engine":
        """The engine of this family for activations of `dtype` on `device`.

        Raises:
            EngineError: none can be used; says why and what to choose instead.
        """
        ...

    def allocate(self, num_slots: int, hidden_size: int, intermediate_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Zero words on the current default device, padded to `multiple`, for `num_slots` slots to be copied into.

        Returns:
            w13 (num_slots, 2 * intermediate_size, hidden_size) and w2 (num_slots, hidden_size, intermediate_size).
        """
        hidden, intermediate = padded(hidden_size, self.multiple), padded(intermediate_size, self.multiple)
        dtype = self.layouts[0].dtype
        return (
            torch.zeros(num_slots, 2 * intermediate, hidden, dtype=dtype),
            torch.zeros(num_slots, hidden, intermediate, dtype=dtype),
        )

    def prepare(self, w13: torch.Tensor, w2: torch.Tensor, max_num_tokens: int, top_k: int) -> None:
        """Puts loaded words into the engine's order, in place, and makes room for calls of up to `max_num_tokens`.

        Raises:
            ValueError: words that `allocate` cannot have returned.
        """
        return

    def check(self, words: torch.Tensor, dtype: torch.dtype) -> int | None:
        """The first slot that holds a weight which activations of `dtype` cannot be multiplied by, or None.

        Args:
            words: w13 or w2, prepared.
        """
        return None

    def run(self, *arguments: *Arguments) -> torch.Tensor:
        """Computes `packed_moe`, which says what is taken, returned and raised."""
        ...

    def allocate_codes(
        self, w13_bits: Sequence[int], w2_bits: Sequence[int], hidden_size: int, intermediate_size: int
    ) -> tuple[CodedMatrices, CodedMatrices]:
        """Zero codes on the current default device, padded to `multiple`, for a rank's experts to be copied into.

        Args:
            w13_bits: the width of each expert's codes of gate and up; `w2_bits` of down.

        Returns:
            w13, with a row of codes for each neuron, and w2, with one for two outputs.
        """
        hidden, intermediate = padded_codes(hidden_size, intermediate_size, self.multiple)
        return (
            allocate_matrices(w13_bits, intermediate, hidden, self.zero_bytes),
            allocate_matrices(w2_bits, hidden // 2, intermediate, self.zero_bytes),
        )

    def zero_bytes(self, num_bytes: int) -> torch.Tensor:
        """Memory for codes: uint8 (num_bytes,), zeros, on the current default device."""
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def prepare_codes(self, w13: CodedMatrices, w2: CodedMatrices, max_num_tokens: int, top_k: int) -> None:
        """`prepare` for codes.

        Where all experts have one width, every tensor but `index` may afterwards be permuted by expert, `codes` as
        (num_experts, bytes): nothing in an expert depends on its place.

        Raises:
            ValueError: matrices that `allocate_codes` cannot have returned.
        """
        return

    def run_coded(self, *arguments: *CodedArguments) -> torch.Tensor:
        """Computes `coded_moe`, which says what is taken, returned and raised."""
        raise EngineError(reads_no_codes(self))


def reads_no_codes(engine: Engine) -> str:
    """Why an engine is refused for coded experts."""
    return f"the engine {engine.name} does not read coded experts; choose VLLM_PUZZLE_ENGINE=reference"


def padded_codes(hidden_size: int, intermediate_size: int, multiple: int) -> tuple[int, int]:
    """The hidden and the intermediate size of coded experts, padded: two outputs make a row of w2's codes."""
    return padded(hidden_size, math.lcm(2, multiple)), padded(intermediate_size, multiple)


def padded(size: int, multiple: int) -> int:
    """`size` rounded up to a multiple of `multiple`."""
    return -(-size // multiple) * multiple
