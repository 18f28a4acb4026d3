"""Coding one expert: gate and up, then down, which makes up for what they lost and for the layers before."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_puzzle.format import join_rows, pack_codes, split_rows, zero_code

from ..merging.correction import OutputCorrection
from ..merging.layer import ExpertWeights
from ..merging.saliency import ExpertStatistics
from .matrix import CodedMatrix, code_matrix


@dataclass(frozen=True)
class CodedExpert:
    """`w13` is gate and up, `w2` the even and odd rows of down; `hidden_size` is how many rows down has."""

    w13: CodedMatrix
    w2: CodedMatrix
    hidden_size: int

    def matrices(self) -> list[torch.Tensor]:
        """Gate, up and down as a reader of the checkpoint has them, bfloat16."""
        gate, up = self.w13.decoded().bfloat16()
        return [gate, up, join_rows(self.w2.decoded(), self.hidden_size).bfloat16()]

    def tensors(self) -> list[torch.Tensor]:
        """What is stored, in the order of `vllm_puzzle.format.coded_tensors`."""
        down_scales = join_rows(self.w2.scales[..., None], self.hidden_size)[:, 0]
        return [
            _packed(self.w13),
            self.w13.codebook,
            self.w13.scales[0].contiguous(),
            self.w13.scales[1].contiguous(),
            _packed(self.w2),
            self.w2.codebook,
            down_scales.contiguous(),
        ]


def code_expert(
    experts: ExpertWeights,
    expert: int,
    bits: tuple[int, int],
    statistics: ExpertStatistics,
    correction: OutputCorrection | None,
) -> CodedExpert:
    """Codes one expert.

    Args:
        bits: the widths of the codes of gate and up, and of down.
        statistics: with moments between inputs, or with their diagonal alone: then errors are not compensated.
        correction: what the layer's output lacks, which down is to make up for; it counts what the coded expert gives
            in place of the expert's own. None codes down as it is.
    """
    gate, up, down = (matrix.float() for matrix in experts.matrices(expert))
    rows = torch.stack([statistics.gate_rows, statistics.up_rows])
    w13 = code_matrix(torch.stack([gate, up]), statistics.hidden, rows, bits[0])
    moments = statistics.intermediate
    if correction is not None:
        coded = ExpertWeights.unread(1, experts.activation)
        coded.put(0, [*w13.decoded().bfloat16(), down])
        down, moments = correction.ask(expert, coded, 0, statistics)
    ones = split_rows(torch.ones(len(down), 1, device=down.device))[..., 0]
    w2 = code_matrix(split_rows(down), moments, ones, bits[1])
    result = CodedExpert(w13, w2, len(down))
    if correction is not None:
        coded.put(0, result.matrices())
        correction.settle(expert, coded, 0)
    return result


def _packed(matrix: CodedMatrix) -> torch.Tensor:
    return pack_codes(matrix.codes, matrix.bits, zero_code(matrix.codebook))
