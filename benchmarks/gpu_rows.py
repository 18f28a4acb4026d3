"""Main loops of the Triton engine's kernels, compiled ahead of time for GPUs that are not here, counted and judged."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from benchmarks.gpu_compile import compile_kernel, machine_code
from benchmarks.machine_code import Loop, MachineCode
from benchmarks.roofline import SHAPES
from vllm_puzzle.kernels.triton.configs import FOLDER, Config, Product, load_configs
from vllm_puzzle.kernels.triton.moe import make_tiles
from vllm_puzzle.kernels.triton.products import down_kernel, gate_up_kernel
from vllm_puzzle.kernels.triton.target import Target
from vllm_puzzle.kernels.triton.tiles import Tile

SHAPE = next(shape for shape in SHAPES if shape.name == "DeepSeek-V3")
DTYPES = {"bfloat16": (tl.bfloat16, "bf16"), "float16": (tl.float16, "fp16")}
# Integer instructions per packed element of a main loop, by members decoded, and bytes of words loaded for one; they
# are held for NVIDIA, where the decoder is PTX, and for bfloat16; float16 takes up to one more.
ALU_BUDGET = {1: 2.0, 2: 5.0}
BYTES_BUDGET = 2.05
_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])


@dataclass(frozen=True)
class Chip:
    """What the programs of one multiprocessor share.

    Attributes:
        registers: 32-bit ones; on AMD those of a SIMD unit, over its lanes.
        shared_bytes: of shared memory; on NVIDIA a program takes 1 KB more than it asks for.
        warps: the most that are resident.
    """

    gpu: GPUTarget
    registers: int
    shared_bytes: int
    shared_reserved: int
    warps: int

    def programs(self, registers: int, shared_bytes: int, num_warps: int) -> int:
        """How many programs are resident at once."""
        # Registers are given to warps in units of 8 a thread; AMD's four SIMDs have a file each.
        files = 4 if self.gpu.backend == "hip" else 1
        warps = files * (self.registers // (-(-registers // 8) * 8 * self.gpu.warp_size))
        by_shared_memory = self.shared_bytes // (shared_bytes + self.shared_reserved) if shared_bytes else self.warps
        return min(warps // num_warps, self.warps // num_warps, by_shared_memory)


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; CDNA 3 ISA: 512 registers a lane.
CHIPS = {
    "sm80": Chip(GPUTarget("cuda", 80, 32), 65536, 164 * 1024, 1024, 64),
    "sm89": Chip(GPUTarget("cuda", 89, 32), 65536, 100 * 1024, 1024, 48),
    "sm90": Chip(GPUTarget("cuda", 90, 32), 65536, 228 * 1024, 1024, 64),
    "sm100": Chip(GPUTarget("cuda", 100, 32), 65536, 228 * 1024, 1024, 64),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 512 * 64, 64 * 1024, 0, 32),
}


@dataclass(frozen=True)
class Row:
    """One main loop of one kernel; counts are per packed element of its tile, as executed by a thread.

    Attributes:
        tokens_per_expert: the configuration's key in its file.
        members: how many members the loop decodes; member: which, if one.
        alu_per_element: integer instructions; half_per_element: packed 16-bit float ones; issued_per_element: all.
        bytes_per_element: of words, asynchronously loaded; activation_bytes_per_element: of activations beside them.
        load_bytes: bytes a thread loads with one instruction, the least of all loads.
        operand_stores: stores of decoded weights to shared memory.
        programs_per_sm: resident at once, with registers and shared memory as they are; stated: in the configuration.
        occupancy: resident warps over the most that can be.
        misses: budgets missed, in words.
    """

    target: str
    kernel: str
    dtype: str
    tokens_per_expert: int
    config: dict[str, Any]
    members: int
    member: str
    alu_per_element: float
    half_per_element: float
    issued_per_element: float
    bytes_per_element: float
    activation_bytes_per_element: float
    load_bytes: int
    operand_stores: int
    tensor_instruction: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    programs_per_sm: int
    stated_programs_per_sm: int
    occupancy: float
    misses: list[str]


def programs_budget(family: str, config: Config, product: Product) -> int:
    """How many programs of a product must fit a multiprocessor at once: as many as its configuration states."""
    if family == "sm90" and config.block_tokens == 8 and _TRITON >= (3, 8):
        # There they multiply with HGMMA instead of HMMA, and a whole step's decoded weights are in registers at once.
        return min(2, product.programs_per_sm)
    return product.programs_per_sm


def cases() -> Iterator[tuple[str, int, Config, str]]:
    """Family, key, configuration and dtype of all that is compiled: every default, and each with its sums in two."""
    for family in CHIPS:
        for key, config in load_configs(FOLDER / f"{family}.json").items():
            halves = {name: getattr(config, name).model_copy(update={"split_k": 2}) for name in ("gate_up", "down")}
            yield family, key, config, "bfloat16"
            yield family, key, config.model_copy(update=halves), "bfloat16"
            yield family, key, config, "float16"


def measure(family: str, key: int, config: Config, dtype: str) -> Iterator[Row]:
    """The rows of both products of a configuration."""
    chip = CHIPS[family]
    tl_dtype, type_name = DTYPES[dtype]
    target = Target(family, "none", num_sms=1, ptx=chip.gpu.backend == "cuda")
    tiles = make_tiles(config, target, SHAPE.hidden_size, SHAPE.intermediate_size, tl_dtype)
    for kernel, tile, product in zip((gate_up_kernel, down_kernel), tiles, (config.gate_up, config.down), strict=True):
        constants = {"TILE": tile, "ACTIVATION": "silu", "WEIGHT_ON_INPUT": False}
        compiled = compile_kernel(kernel, constants, product.num_warps, chip.gpu, type_name, tile.split_k > 1)
        code = machine_code(compiled)
        # With two members to serve, the loop that multiplies twice as much decodes both.
        most = max(loop.tensor for loop in code.main_loops)
        ones = sorted(
            (loop for loop in code.main_loops if config.members == 1 or loop.tensor < most),
            key=lambda loop: loop.integer,
        )
        boths = [loop for loop in code.main_loops if config.members == 2 and loop.tensor == most]
        assert len(ones) == 2
        assert len(boths) == config.members - 1
        for loop, member in zip([*ones, *boths], ["0", "1", "both"], strict=False):
            yield _row(chip, family, key, config, product, dtype, kernel.__name__, tile, loop, member, code, compiled)


def _row(
    chip: Chip,
    family: str,
    key: int,
    config: Config,
    product: Product,
    dtype: str,
    kernel: str,
    tile: Tile,
    loop: Loop,
    member: str,
    code: MachineCode,
    compiled: Any,
) -> Row:
    members = 2 if member == "both" else 1
    threads = product.num_warps * chip.gpu.warp_size
    elements = tile.block_rows * tile.block_k / threads
    loads = loop.asynchronous_copies if chip.gpu.backend == "cuda" else loop.global_loads
    # Where activations are fewer than one load of every thread, some threads load none.
    load_bytes = min(loads, default=0)
    activations = members * -(-tile.block_tokens * tile.block_k * 2 // max(1, load_bytes * threads)) * load_bytes
    words = sum(size * count for size, count in loads.items()) - activations
    programs = chip.programs(code.registers, compiled.metadata.shared, product.num_warps)
    alu = loop.integer / elements
    misses = {
        f"spills {code.spill_bytes} bytes": code.spill_bytes > 0 or code.local_accesses > 0,
        f"{programs} programs a multiprocessor": programs < programs_budget(family, config, product),
    }
    if chip.gpu.backend == "cuda":
        misses |= {
            f"{alu:.2f} integer instructions": alu > ALU_BUDGET[members] and dtype == "bfloat16",
            f"{words / elements:.2f} bytes": words / elements > BYTES_BUDGET,
            "loads of less than 16 bytes": load_bytes < 16 or bool(loop.global_loads),
        }
    return Row(
        target=family,
        kernel=kernel,
        dtype=dtype,
        tokens_per_expert=key,
        config={"members": config.members, "block_tokens": config.block_tokens, **product.model_dump()},
        members=members,
        member=member,
        alu_per_element=round(alu, 3),
        half_per_element=round(loop.half / elements, 3),
        issued_per_element=round(loop.issued / elements, 3),
        bytes_per_element=round(words / elements, 3),
        activation_bytes_per_element=round(activations / elements, 3),
        load_bytes=load_bytes,
        operand_stores=loop.shared_stores,
        tensor_instruction=next(i.text.split()[0] for i in loop.instructions if i.kind == "tensor"),
        registers=code.registers,
        spill_bytes=code.spill_bytes,
        shared_bytes=compiled.metadata.shared,
        programs_per_sm=programs,
        stated_programs_per_sm=product.programs_per_sm,
        occupancy=programs * product.num_warps / chip.warps,
        misses=[miss for miss, missed in misses.items() if missed],
    )
