"""vLLM's CPU kernels for the experts that `benchmarks.cpu_moe` measures, in other formats.

Each one takes the BF16 experts that the packed words decode to, so all of them compute the same function but for their
own rounding. vLLM 0.32's plugin classes use the FP8, INT8 and INT4 kernels only on CPUs with AMX
(vllm/model_executor/layers/fused_moe/experts/cpu_moe.py); called directly they run on AVX-512 too, and are compared.
"""

import torch
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import prepare_int4_moe_layer_for_cpu
from vllm.platforms import current_platform

from benchmarks.cpu_moe.engine import Engine

FP8_BLOCK = 128
INT4_GROUP = 128


class VllmBf16(Engine):
    """`cpu_fused_moe`, as vLLM runs unquantized experts; `isa` is `amx` or `vec`."""

    bytes_per_weight = 2

    def __init__(self, w13: torch.Tensor, w2: torch.Tensor, isa: str) -> None:
        self.name = f"bf16_{isa}"
        self._isa = isa
        self._w13, self._w2 = (ops.cpu_prepack_moe_weight(weight, isa) for weight in (w13, w2))

    def run(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(x)
        ops.cpu_fused_moe(output, x, self._w13, self._w2, None, None, topk_weights, topk_ids, "silu", self._isa)
        return output

    def copy(self) -> "VllmBf16":
        other = object.__new__(VllmBf16)
        other.name, other._isa = self.name, self._isa
        other._w13, other._w2 = self._w13.clone(), self._w2.clone()
        return other


class VllmQuantized(Engine):
    """`fused_experts_cpu` on weights, scales and zero points as `_fp8`, `_int8` or `_int4` made them."""

    def __init__(
        self,
        name: str,
        bytes_per_weight: float,
        method: ops.CPUQuantMethod,
        tensors: tuple[torch.Tensor | None, ...],
        block: list[int] | None = None,
    ) -> None:
        self.name, self.bytes_per_weight = name, bytes_per_weight
        self._method, self._tensors, self._block = method, tensors, block

    def run(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(x)
        w13, w2, *scales_and_zeros = self._tensors
        ops.fused_experts_cpu(output, x, w13, w2, topk_weights, topk_ids, self._method, *scales_and_zeros, self._block)
        return output

    def copy(self) -> "VllmQuantized":
        tensors = tuple(None if tensor is None else tensor.clone() for tensor in self._tensors)
        return VllmQuantized(self.name, self.bytes_per_weight, self._method, tensors, self._block)


def _fp8(w13: torch.Tensor, w2: torch.Tensor) -> VllmQuantized:
    """e4m3 with a scale per block of 128 x 128, activations in BF16 (W8A16)."""
    weights, scales = [], []
    for weight in (w13, w2):
        experts, rows, columns = weight.shape
        blocks = weight.float().view(experts, rows // FP8_BLOCK, FP8_BLOCK, columns // FP8_BLOCK, FP8_BLOCK)
        scale = blocks.abs().amax(dim=(2, 4), keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
        rounded = (blocks / scale).to(torch.float8_e4m3fn).view(weight.shape)
        weights.append(torch.ops._C.convert_weight_packed(rounded))
        scales.append(scale.reshape(experts, rows // FP8_BLOCK, columns // FP8_BLOCK))
    tensors = (*weights, *scales, None, None)
    return VllmQuantized("fp8", 1, ops.CPUQuantMethod.FP8_W8A16, tensors, [FP8_BLOCK, FP8_BLOCK])


def _int8(w13: torch.Tensor, w2: torch.Tensor) -> VllmQuantized:
    """INT8 with a scale per output row, activations rounded to INT8 token by token (W8A8)."""
    weights, scales = [], []
    for weight in (w13, w2):
        scale = weight.float().abs().amax(dim=-1, keepdim=True) / 127
        rounded = (weight.float() / scale).round().to(torch.int8)
        weights.append(torch.ops._C.convert_weight_packed(rounded))
        scales.append(scale.squeeze(-1))
    return VllmQuantized("int8", 1, ops.CPUQuantMethod.INT8_W8A8, (*weights, *scales, None, None))


def _int4(w13: torch.Tensor, w2: torch.Tensor) -> VllmQuantized:
    """INT4 with a scale per 128 columns, activations rounded to INT8 (W4A8), packed as GPTQ checkpoints are."""
    packed, scales = [], []
    for weight in (w13, w2):
        experts, rows, columns = weight.shape
        groups = weight.float().view(experts, rows, columns // INT4_GROUP, INT4_GROUP)
        scale = groups.abs().amax(dim=-1, keepdim=True) / 7
        nibbles = ((groups / scale).round() + 8).to(torch.int32).view(experts, rows, columns // 8, 8)
        words = sum(nibbles[..., i] << (4 * i) for i in range(8))
        assert isinstance(words, torch.Tensor)
        packed.append(words.transpose(1, 2).contiguous())
        scales.append(scale.squeeze(-1).transpose(1, 2).contiguous().bfloat16())
    blocked = prepare_int4_moe_layer_for_cpu(*packed, *scales)
    return VllmQuantized("int4", 0.5, ops.CPUQuantMethod.INT4_W4A8, blocked)


def has_amx() -> bool:
    """Whether vLLM's AMX kernels can run here; asks the kernel for the tiles."""
    return bool(torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx())


def has_quantized() -> bool:
    """Whether vLLM has its FP8, INT8 and INT4 kernels on this CPU: its library for those without AVX-512 has none."""
    current_platform.import_kernels()
    return hasattr(torch.ops._C, "convert_weight_packed")


def build_peers(dense13: torch.Tensor, dense2: torch.Tensor) -> list[Engine]:
    """vLLM's engines that run on this CPU, from BF16 experts: w13 (experts, 2 I, H), w2 (experts, H, I)."""
    current_platform.import_kernels()
    dense: list[Engine] = [VllmBf16(dense13, dense2, isa) for isa in (("amx", "vec") if has_amx() else ("vec",))]
    quantizers = (_fp8, _int8, _int4) if has_quantized() else ()
    return dense + [quantize(dense13, dense2) for quantize in quantizers]


def left_out() -> str | None:
    """Which of vLLM's kernels this CPU goes without, for people."""
    if has_quantized():
        return None
    return "vLLM has no FP8, INT8 and INT4 kernels for CPUs without AVX-512: those peers are left out"
