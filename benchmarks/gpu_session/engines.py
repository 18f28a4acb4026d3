"""The packed engine's peers on the same experts: vLLM's fused_moe and torch's grouped products, in BF16 and FP8."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn.functional import silu

from benchmarks.gpu_moe.peers import FP8_BLOCK, Engine, fp8_blocks, plain_experts
from vllm_puzzle.tuning.layer import PackedLayer

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Multiply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

FP8 = torch.float8_e4m3fn
BF16_TOLERANCE, FP8_TOLERANCE = 0.015, 0.2
# Grouped products round once more: each choice's result, and its router weight.
GROUPED_TOLERANCE = 0.03


def fused_call(w13: torch.Tensor, w2: torch.Tensor, scales: Sequence[torch.Tensor] | None) -> Run:
    """vLLM's fused_moe, from a folder that `peer` gathered or from a vLLM that is installed.

    Args:
        scales: of blocks of w13 and w2 in FP8; None for BF16.
    """
    more = {}
    if scales is not None:
        block = [FP8_BLOCK, FP8_BLOCK]
        more = {"use_fp8_w8a8": True, "w1_scale": scales[0], "w2_scale": scales[1], "block_shape": block}

    def run(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        # Imported here and not above: a peer that cannot be loaded fails as an engine of its own.
        from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts_impl

        return fused_experts_impl(x, w13, w2, weights, ids, **more)

    return run


def sorts_by_library() -> bool:
    """Whether vLLM sorts tokens by its compiled library, and not the stand-ins of `stubs`."""
    from vllm import _custom_ops

    return getattr(_custom_ops, "loaded", True)


def engines(layer: PackedLayer, peer: bool, fp8: bool) -> Iterator[Engine]:
    """BF16 by vLLM first, to which ratios are; then packed, then the others.

    Args:
        peer: whether there is a vLLM, or what stands for it.
        fp8: whether the card multiplies in FP8.
    """
    w13, w2 = plain_experts(layer)
    if peer:
        yield Engine("vllm_bf16", 2, False, BF16_TOLERANCE, fused_call(w13, w2, None))
    yield Engine("packed", 2, True, BF16_TOLERANCE, layer.run)
    if peer and fp8:
        (q13, scale13), (q2, scale2) = (fp8_blocks(weights, FP8) for weights in (w13, w2))
        yield Engine("vllm_fp8", 1, False, FP8_TOLERANCE, fused_call(q13, q2, (scale13, scale2)))
    yield Engine("grouped_mm", 2, False, GROUPED_TOLERANCE, _grouped(len(w2), lambda ends: _plain(w13, w2, ends)))
    if fp8:
        rows = [_rows_fp8(weights) for weights in (w13, w2)]
        yield Engine("scaled_grouped_mm", 1, False, FP8_TOLERANCE, _grouped(len(w2), lambda ends: _scaled(rows, ends)))


def _grouped(num_experts: int, products: Callable[[torch.Tensor], Sequence[Multiply]]) -> Run:
    """Experts as two grouped products of torch's; nothing waits for the device.

    Args:
        products: gate-up and down, from where each expert's rows end, (num_experts,) int32.
    """

    def run(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        flat = ids.flatten().long()
        order = flat.argsort(stable=True)
        counts = torch.zeros(num_experts, dtype=torch.int32, device=x.device)
        counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
        gate_up, down = products(counts.cumsum(0, dtype=torch.int32))
        gate, up = gate_up(x[order // ids.shape[1]], x).chunk(2, dim=-1)
        results = down(silu(gate) * up, x)
        placed = torch.empty_like(results)
        placed[order] = results
        return (placed.view(*ids.shape, -1) * weights[..., None].to(x.dtype)).sum(1)

    return run


def _plain(w13: torch.Tensor, w2: torch.Tensor, ends: torch.Tensor) -> list[Multiply]:
    def multiply(w: torch.Tensor) -> Multiply:
        return lambda rows, like: torch._grouped_mm(rows, w.transpose(1, 2), offs=ends)

    return [multiply(w13), multiply(w2)]


def _scaled(weights: Sequence[tuple[torch.Tensor, torch.Tensor]], ends: torch.Tensor) -> list[Multiply]:
    def multiply(w: torch.Tensor, w_scale: torch.Tensor) -> Multiply:
        def product(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
            quantized, scale = _rows_fp8(rows)
            return torch._scaled_grouped_mm(
                quantized, w.transpose(1, 2), scale, w_scale, offs=ends, out_dtype=like.dtype, use_fast_accum=True
            )

        return product

    return [multiply(w, scale) for w, scale in weights]


def _rows_fp8(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in FP8, and the scale of each, float32."""
    largest = matrix.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-10)
    scale = largest / torch.finfo(FP8).max
    return (matrix / scale.to(matrix.dtype)).to(FP8), scale.squeeze(-1)
