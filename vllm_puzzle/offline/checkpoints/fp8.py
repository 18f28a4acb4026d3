"""FP8 weights with a scale per block, as DeepSeek-V3 is published: finding them, and their values in BF16."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_puzzle.format import QUANT_METHOD

from ..errors import CheckpointError
from .checkpoint import TensorInfo

_FP8 = "F8_E4M3"
SCALE_SUFFIX = "_scale_inv"
"""What is appended to a tensor's name to name its scales, float32."""


def block_size(raw_config: Mapping[str, Any], path: Path) -> tuple[int, int] | None:
    """The rows and columns that share a scale; None where config.json says that nothing is quantized.

    Raises:
        CheckpointError: the checkpoint is quantized in another way.
    """
    quantization = raw_config.get("quantization_config")
    if quantization is None:
        return None
    method, size = None, None
    if isinstance(quantization, dict):
        method, size = quantization.get("quant_method"), quantization.get("weight_block_size")
    if method == "fp8" and isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
        return size[0], size[1]
    if method == QUANT_METHOD:
        raise CheckpointError(
            f"{path} is packed already: `vllm-puzzle inspect` shows what it holds, `vllm-puzzle unpack` writes it back "
            f"in BF16; give the checkpoint that it was converted from"
        )
    raise CheckpointError(
        f"{path} is already quantized ({method}); convert the original BF16 checkpoint, or an FP8 one with a "
        f"weight_block_size"
    )


def find_scales(tensors: Mapping[str, TensorInfo], block: tuple[int, int], path: Path) -> dict[str, str]:
    """The name of every FP8 tensor's scales, by the tensor's own name.

    Raises:
        CheckpointError: scales are missing, misshapen, or scale nothing.
    """
    scales = {name: name + SCALE_SUFFIX for name, info in tensors.items() if info.dtype == _FP8}
    for name, scale in scales.items():
        info = tensors[name]
        if scale not in tensors:
            raise CheckpointError(
                f"{path / info.shard}: {name} is {_FP8}, but its {scale} is missing; copy or download the "
                f"checkpoint again"
            )
        expected = _scale_shape(info.shape, block)
        if len(info.shape) != 2 or tensors[scale].shape != expected:
            raise CheckpointError(
                f"{path / tensors[scale].shard}: {scale} has shape {list(tensors[scale].shape)} for a {name} of "
                f"{list(info.shape)}; weight_block_size {list(block)} of config.json implies {list(expected)}"
            )
    idle = min((name for name in tensors if name.endswith(SCALE_SUFFIX) and name not in scales.values()), default=None)
    if idle is not None:
        raise CheckpointError(
            f"{path / tensors[idle].shard}: {idle} has no {_FP8} tensor to scale; leave it out, or copy or "
            f"download the checkpoint again"
        )
    return scales


def scaled_bytes(size: tuple[int, int], block: tuple[int, int]) -> int:
    """The bytes of a matrix in FP8 and its scales."""
    return math.prod(size) + 4 * math.prod(_scale_shape(size, block))


def dequantize(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """BF16 (rows, columns) of a float8_e4m3fn `weight` of the same shape, each block of it times its `scale`.

    `scale` is floating, (ceil(rows / block[0]), ceil(columns / block[1])). The last blocks may be cut short.
    """
    rows, columns = weight.shape
    spread = scale.float().repeat_interleave(block[0], dim=0)[:rows].repeat_interleave(block[1], dim=1)[:, :columns]
    return (weight.float() * spread).to(torch.bfloat16)


def _scale_shape(size: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    return tuple(math.ceil(length / step) for length, step in zip(size, block, strict=False))
