"""silu-and-mul in one launch, as vLLM's compiled kernel is."""

from enum import Enum

import torch
import triton
import triton.language as tl

_BLOCK = 1024


class MoEActivation(Enum):
    SILU = "silu"

    @classmethod
    def from_str(cls, text: str) -> "MoEActivation":
        return cls(text)


@triton.jit
def _silu_and_mul(input_ptr, output_ptr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < COLUMNS
    gate = tl.load(input_ptr + row * 2 * COLUMNS + column, mask=mask).to(tl.float32)
    up = tl.load(input_ptr + row * 2 * COLUMNS + COLUMNS + column, mask=mask).to(tl.float32)
    inner = gate * tl.sigmoid(gate) * up
    tl.store(output_ptr + row * COLUMNS + column, inner.to(output_ptr.dtype.element_ty), mask=mask)


def apply_moe_activation(
    activation: MoEActivation, output: torch.Tensor, input: torch.Tensor, **options: object
) -> torch.Tensor:
    rows, columns = output.shape
    _silu_and_mul[(rows, triton.cdiv(columns, _BLOCK))](input, output, COLUMNS=columns, BLOCK=_BLOCK)
    return output
