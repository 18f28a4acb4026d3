"""The coded experts of a layer as engines get them: codes of all experts in one buffer, codebooks and scales."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from vllm_puzzle.format import CODE_BITS, num_words

LARGEST_CODEBOOK = 1 << max(CODE_BITS)


@dataclass(frozen=True)
class CodedMatrices:
    """One matrix kind of a rank's experts: gate and up together, or down.

    `rows` and `columns` below are those of codes, two weights each. Padding needs no mark: rows of padding have the
    scale 0, and columns of padding meet activations that are 0.
    """

    codes: torch.Tensor
    """uint8 (num_bytes,): the codes of one expert after the other."""
    index: torch.Tensor
    """int64 (num_experts, 2): where an expert's codes begin in `codes`, in bytes, and the width of a code, in bits."""
    codebook: torch.Tensor
    """bfloat16 (num_experts, 256, 2), zeros past `2 ** bits`."""
    scale: torch.Tensor
    """bfloat16 (num_experts, 2, rows): of each row's first and second weight."""

    def packed(self, expert: int) -> torch.Tensor:
        """Where an expert's bit stream is copied to: int32 (rows, num_words(columns, bits)), a view of `codes`."""
        begin = int(self.index[expert, 0])
        end = int(self.index[expert + 1, 0]) if expert + 1 < len(self.index) else len(self.codes)
        rows = self.scale.shape[2]
        return self.codes[begin:end].view(torch.int32).view(rows, (end - begin) // (4 * rows))

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `coded_moe` takes them."""
        return self.codes, self.index, self.codebook, self.scale


def allocate_matrices(
    bits: Sequence[int], rows: int, columns: int, allocate: Callable[[int], torch.Tensor]
) -> CodedMatrices:
    """Zero codes, codebooks and scales, to be copied into.

    Args:
        bits: of each expert.
        rows: of an expert's codes, padded as the engine wants them; so are `columns`.
        allocate: makes uint8 zeros of so many bytes.
    """
    sizes = [4 * rows * num_words(columns, width) for width in bits]
    begins = [0, *accumulate(sizes)][: len(sizes)]
    return CodedMatrices(
        codes=allocate(sum(sizes)),
        index=torch.tensor(list(zip(begins, bits, strict=True)), dtype=torch.int64).view(-1, 2),
        codebook=torch.zeros(len(bits), LARGEST_CODEBOOK, 2, dtype=torch.bfloat16),
        scale=torch.zeros(len(bits), 2, rows, dtype=torch.bfloat16),
    )
