"""Compiling the Triton engine's kernels ahead of time, as the engine launches them, for GPUs that need not be here."""

from collections.abc import Iterator, Mapping
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.gpu_static.machine_code import MachineCode, read_amdgcn, read_cubin
from vllm_puzzle.kernels.triton.elementwise import activate_kernel, combine_kernel
from vllm_puzzle.kernels.triton.routing import CHUNK, SMALLEST_CHUNK, count_kernel, place_kernel, warps


def compile_kernel(
    kernel: Any, constants: Mapping[str, Any], num_warps: int, gpu: GPUTarget, dtype: str = "bf16", split: bool = False
) -> Any:
    """What triton.compile gives, with all pointers aligned to 16 bytes.

    Args:
        constants: by argument name; those that the kernel does not have are left out.
        dtype: of activations, bf16 or fp16.
        split: whether sums are split, and thus kept in float32.
    """
    sums = "*fp32" if split else f"*{dtype}"
    pointers = {
        "x_ptr": f"*{dtype}",
        "w13_ptr": "*i16",
        "w2_ptr": "*i16",
        # What gate-up gives is the sums where they are split; everyone else has what became of them.
        "inner_ptr": sums if "w13_ptr" in kernel.arg_names else f"*{dtype}",
        "partial_ptr": sums,
        "output_ptr": f"*{dtype}",
        "topk_weights_ptr": "*fp32",
        **{f"{name}_ptr": "*i32" for name in ("topk_ids", "slot_of_expert", "counts", "choices", "blocks")},
    }
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names},
        {(index,): constants[name] for index, name in enumerate(names) if name in constants},
        {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name in pointers},
    )
    return triton.compile(source, target=gpu, options={"num_warps": num_warps})


def machine_code(compiled: Any) -> MachineCode:
    """The counts of what `compile_kernel` gave."""
    return read_cubin(compiled.asm["cubin"]) if "cubin" in compiled.asm else read_amdgcn(compiled.asm["amdgcn"])


def compile_surroundings(gpu: GPUTarget) -> Iterator[tuple[str, MachineCode]]:
    """Names and machine code of the kernels around the products, the last of them for up to 256 slots."""
    sizes = {"ROWS": 2048, "SPLIT_K": 2, "BLOCK": 1024}
    for activation in ("silu", "gelu", "gelu_tanh"):
        constants = {**sizes, "ACTIVATION": activation}
        yield "activate", machine_code(compile_kernel(activate_kernel, constants, 4, gpu, split=True))
    for split in (False, True):
        constants = {**sizes, "SPLIT_K": 1 + split, "TOP_K": 8, "WEIGHT_ON_INPUT": False}
        yield "combine", machine_code(compile_kernel(combine_kernel, constants, 4, gpu, split=split))
    for bins in (64, 256, 512):
        yield "count", machine_code(compile_kernel(count_kernel, {"CHUNK": CHUNK, "BINS": bins}, warps(CHUNK), gpu))
        for members, chunk, one_chunk in (
            (2, SMALLEST_CHUNK, True),
            (2, CHUNK, False),
            (1, CHUNK, True),
            (1, CHUNK, False),
        ):
            cut = {"BINS": bins, "CHUNK": chunk, "ONE_CHUNK": one_chunk, "MEMBERS": members, "BLOCK_TOKENS": 16}
            yield "place", machine_code(compile_kernel(place_kernel, cut, warps(chunk), gpu))
