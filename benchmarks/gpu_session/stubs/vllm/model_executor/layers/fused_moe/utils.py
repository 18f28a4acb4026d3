"""Activations to FP8 in one launch, with a scale for each group, as vLLM's compiled kernel does."""

import torch
import triton
import triton.language as tl

from vllm.platforms import current_platform

_LARGEST = tl.constexpr(448.0)


def enable_swap_ab(block_m: int, block_n: int) -> bool:
    return current_platform.is_device_capability(90) and block_m < 64 and block_n >= 64


def resolve_moe_use_td() -> bool:
    return False


def warn_if_moe_use_td_ineffective(*values: object, **options: object) -> None:
    pass


@triton.jit
def _quantize(x_ptr, rounded_ptr, scales_ptr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    group = tl.program_id(0).to(tl.int64)
    index = group * GROUP + tl.arange(0, GROUP)
    x = tl.load(x_ptr + index).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x)), 1e-10) / _LARGEST
    tl.store(rounded_ptr + index, tl.clamp(x / scale, -_LARGEST, _LARGEST).to(rounded_ptr.dtype.element_ty))
    tl.store(scales_ptr + group, scale)


def moe_kernel_quantize_input(
    A: torch.Tensor,  # noqa: N803
    A_scale: torch.Tensor | None,  # noqa: N803
    quant_dtype: torch.dtype | None,
    per_act_token_quant: bool,
    block_shape: list[int] | None = None,
    **options: object,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if quant_dtype is None or block_shape is None:
        return A, A_scale
    rounded = torch.empty(A.shape, dtype=quant_dtype, device=A.device)
    scales = torch.empty(A.shape[0], A.shape[1] // block_shape[1], dtype=torch.float32, device=A.device)
    _quantize[(scales.numel(),)](A, rounded, scales, GROUP=block_shape[1], num_warps=1)
    return rounded, scales
