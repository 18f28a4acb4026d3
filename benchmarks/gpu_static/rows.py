"""The main loops of the Triton engine's products, compiled ahead of time, counted and compared with budgets."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from benchmarks.gpu_static.chips import CHIPS, Chip
from benchmarks.gpu_static.compiling import compile_kernel, machine_code
from benchmarks.gpu_static.machine_code import Loop, MachineCode
from benchmarks.shapes import DEEPSEEK_V3
from vllm_puzzle.kernels.triton.configs import FOLDER, Config, Product, load_configs
from vllm_puzzle.kernels.triton.moe import make_tiles
from vllm_puzzle.kernels.triton.products import down_kernel, gate_up_kernel
from vllm_puzzle.kernels.triton.target import Target
from vllm_puzzle.kernels.triton.tiles import Tile

SHAPE = DEEPSEEK_V3
DTYPES = {"bfloat16": (tl.bfloat16, "bf16"), "float16": (tl.float16, "fp16")}
# The most integer instructions per packed element of a main loop, by members decoded, and the most bytes of words
# loaded for one. They are for NVIDIA, where the decoder is PTX, and for bfloat16; float16 takes up to one more.
ALU_BUDGET = {1: 2.0, 2: 5.0}
BYTES_BUDGET = 2.05
_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])


@dataclass(frozen=True)
class Case:
    """A configuration to compile.

    Attributes:
        family: of GPUs, a key of CHIPS.
        tokens_per_expert: the configuration's key in its file.
        dtype: of activations, a key of DTYPES.
    """

    family: str
    tokens_per_expert: int
    config: Config
    dtype: str


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


def cases() -> Iterator[Case]:
    """All that is compiled: every default, and each with its sums in two parts and in float16."""
    for family in CHIPS:
        for key, config in load_configs(FOLDER / f"{family}.json").items():
            halves = {name: getattr(config, name).model_copy(update={"split_k": 2}) for name in ("gate_up", "down")}
            yield Case(family, key, config, "bfloat16")
            yield Case(family, key, config.model_copy(update=halves), "bfloat16")
            yield Case(family, key, config, "float16")


def programs_budget(family: str, config: Config, product: Product) -> int:
    """How many programs of a product must fit a multiprocessor at once: as many as its configuration states."""
    if family == "sm90" and config.block_tokens == 8 and _TRITON >= (3, 8):
        # There they multiply with HGMMA instead of HMMA, and a whole step's decoded weights are in registers at once.
        return min(2, product.programs_per_sm)
    return product.programs_per_sm


def measure(case: Case) -> Iterator[Row]:
    """The rows of both products of a configuration."""
    chip, config = CHIPS[case.family], case.config
    dtype, type_name = DTYPES[case.dtype]
    target = Target(case.family, "none", num_sms=1, ptx=chip.gpu.backend == "cuda")
    tiles = make_tiles(config, target, SHAPE.hidden_size, SHAPE.intermediate_size, dtype)
    for kernel, tile, product in zip((gate_up_kernel, down_kernel), tiles, (config.gate_up, config.down), strict=True):
        constants = {"TILE": tile, "ACTIVATION": "silu", "WEIGHT_ON_INPUT": False}
        binary = compile_kernel(kernel, constants, product.num_warps, chip.gpu, type_name, tile.split_k > 1)
        compiled = _Compiled(case, kernel.__name__, product, tile, machine_code(binary), binary.metadata.shared)
        for member, loop in compiled.loops().items():
            yield compiled.row(member, loop)


@dataclass(frozen=True)
class _Compiled:
    """One product of a case, compiled; `shared_bytes` is the shared memory that a program asks for."""

    case: Case
    kernel: str
    product: Product
    tile: Tile
    code: MachineCode
    shared_bytes: int

    @property
    def chip(self) -> Chip:
        return CHIPS[self.case.family]

    @property
    def threads(self) -> int:
        """The threads of a program."""
        return self.product.num_warps * self.chip.gpu.warp_size

    @property
    def elements(self) -> float:
        """Packed elements that a thread decodes in one step of a main loop."""
        return self.tile.block_rows * self.tile.block_k / self.threads

    @property
    def programs(self) -> int:
        """Resident on a multiprocessor at once."""
        return self.chip.programs(self.code.registers, self.shared_bytes, self.product.num_warps)

    def loops(self) -> dict[str, Loop]:
        """The main loop for member 0, for member 1, and where a program serves two members, for both."""
        # With two members to serve, the loop that multiplies twice as much decodes both.
        members = self.case.config.members
        most = max(loop.tensor for loop in self.code.main_loops)
        ones = [loop for loop in self.code.main_loops if members == 1 or loop.tensor < most]
        boths = [loop for loop in self.code.main_loops if members == 2 and loop.tensor == most]
        assert len(ones) == 2
        assert len(boths) == members - 1
        # Member 1 takes more instructions to decode.
        ones.sort(key=lambda loop: loop.integer)
        return dict(zip(("0", "1", "both"), [*ones, *boths], strict=False))

    def row(self, member: str, loop: Loop) -> Row:
        """The row of one of the loops."""
        members = 2 if member == "both" else 1
        elements = self.elements
        loads = loop.asynchronous_copies if self.chip.gpu.backend == "cuda" else loop.global_loads
        load_bytes = min(loads, default=0)
        activations = self._activation_bytes(members, load_bytes)
        words = sum(size * count for size, count in loads.items()) - activations
        return Row(
            target=self.case.family,
            kernel=self.kernel,
            dtype=self.case.dtype,
            tokens_per_expert=self.case.tokens_per_expert,
            config={
                "members": self.case.config.members,
                "block_tokens": self.case.config.block_tokens,
                **self.product.model_dump(),
            },
            members=members,
            member=member,
            alu_per_element=round(loop.integer / elements, 3),
            half_per_element=round(loop.half / elements, 3),
            issued_per_element=round(loop.issued / elements, 3),
            bytes_per_element=round(words / elements, 3),
            activation_bytes_per_element=round(activations / elements, 3),
            load_bytes=load_bytes,
            operand_stores=loop.shared_stores,
            tensor_instruction=next(i.text.split()[0] for i in loop.instructions if i.kind == "tensor"),
            registers=self.code.registers,
            spill_bytes=self.code.spill_bytes,
            shared_bytes=self.shared_bytes,
            programs_per_sm=self.programs,
            stated_programs_per_sm=self.product.programs_per_sm,
            occupancy=self.programs * self.product.num_warps / self.chip.warps,
            misses=self._misses(loop, members, load_bytes, words),
        )

    def _activation_bytes(self, members: int, load_bytes: int) -> int:
        """The bytes of activations that a thread loads in one step."""
        # Where activations are fewer than one load of every thread, some threads load none.
        values = self.tile.block_tokens * self.tile.block_k
        return members * -(-values * 2 // max(1, load_bytes * self.threads)) * load_bytes

    def _misses(self, loop: Loop, members: int, load_bytes: int, words: int) -> list[str]:
        """The budgets that a loop misses, in words."""
        alu, bytes_per_element = loop.integer / self.elements, words / self.elements
        budget = programs_budget(self.case.family, self.case.config, self.product)
        misses = {
            f"spills {self.code.spill_bytes} bytes": self.code.spill_bytes > 0 or self.code.local_accesses > 0,
            f"{self.programs} programs a multiprocessor": self.programs < budget,
        }
        if self.chip.gpu.backend == "cuda":
            misses |= {
                f"{alu:.2f} integer instructions": alu > ALU_BUDGET[members] and self.case.dtype == "bfloat16",
                f"{bytes_per_element:.2f} bytes": bytes_per_element > BYTES_BUDGET,
                "loads of less than 16 bytes": load_bytes < 16 or bool(loop.global_loads),
            }
        return [miss for miss, missed in misses.items() if missed]
