"""A model, not a measurement, of how long one MoE layer takes on a GPU: experts packed in pairs against plain BF16.

A kernel is as slow as the resource that it uses up first: HBM, tensor cores, integer units, half-precision units or
instruction issue. Both sides go through the same model and differ only in the bytes that they read and the instructions
that they execute. The counts per element come from compiled machine code, the device figures from the vendors,
the number of active slots and of token tiles from random routing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, lgamma, log
from typing import Literal, NamedTuple

from benchmarks.gpu_static.devices import DEVICES, Device
from benchmarks.shapes import GPU_SHAPES
from vllm_puzzle.tuning.shape import LayerShape

Bound = Literal["memory", "tensor", "alu", "half", "issue"]

BYTES_PER_ELEMENT = 2
MEMORY_EFFICIENCY = 0.8
TENSOR_EFFICIENCY = 0.6
# Ours: sorting, gate-up, the activation of split sums, down, the weighted sum over choices. vLLM's `fused_moe` in BF16:
# sorting, gate-up, the activation, down, the sum.
NUM_KERNELS = 5
MICROSECONDS_PER_KERNEL = 2.0
NUM_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

ASSUMPTIONS = (
    "One layer on one GPU: its routed experts only, all of them in pairs, every word read from HBM at each call.",
    "Routing is uniform and random, tokens are independent. The time is that of the expected load: neither the spread "
    "of the load over experts and multiprocessors, nor the last, partly filled wave of programs, nor latency is "
    "modelled.",
    "The time is that of the slowest resource, as if all of them overlapped perfectly, plus the launches.",
    f"HBM gives {MEMORY_EFFICIENCY:.0%} and the tensor cores {TENSOR_EFFICIENCY:.0%} of their peak, on both sides; "
    "integer, half-precision and issue rates are the peak ones.",
    f"Each side launches {NUM_KERNELS} kernels of {MICROSECONDS_PER_KERNEL:g} µs inside a CUDA graph.",
    "BF16 uses the same token tiles as packed, and its only instructions are those of its own main loop.",
    "A slot is read from HBM once. Programs that need the same words run side by side: those of further token tiles, "
    "and of the second member where a program serves one, decode them again and read them from the L2 cache, whose "
    "bandwidth is not modelled.",
    "Activations are 16-bit and pass through HBM: inputs read once, inner values and the results of every choice "
    "written and read, outputs written.",
    "Instructions per element are counted in the machine code of the configuration that the engine takes for the "
    "number of tokens; BF16 has those of the loop for one member, but none of its integer and half-precision ones.",
)


class Occupancy(NamedTuple):
    """Expected numbers of experts that have tokens, and of slots of which one or both members have."""

    active_experts: float
    slots_one_member: float
    slots_both_members: float


class Tile(NamedTuple):
    """What one program computes: for how many members of a slot, and for how many token rows of each."""

    members: int
    tokens: int


@dataclass(frozen=True)
class Instructions:
    """Instructions in a main loop per weight element, each counted as executed by one lane (thread).

    That is a thread's instructions divided by the elements that the thread decodes, or a program's warp instructions
    times the warp size divided by the elements of its weight tile. A packed half-precision instruction counts once.
    `issued` is all instructions, `alu` the 32-bit integer ones and `half` the half-precision ones among them.
    """

    alu: float
    half: float
    issued: float


@dataclass(frozen=True)
class Costs:
    """Main loops compiled for one target: packed words of which one member or both are decoded, and plain BF16."""

    one: Instructions
    both: Instructions
    bf16_issued: float


Plan = Callable[[Device, LayerShape, int], tuple[Tile, Costs]]
"""What runs on a device for a layer and a number of tokens."""


@dataclass(frozen=True)
class Prediction:
    """What the model says of one layer; slots, experts and all amounts of work are expected values.

    `bytes_packed` and `bytes_bf16` go through HBM. `issue_slots` counts warp instructions in the packed main loops.
    `bound` names the resource that holds packed up.
    """

    device: Device
    shape: LayerShape
    num_tokens: int
    tile: Tile
    active_slots: float
    active_experts: float
    bytes_packed: float
    bytes_bf16: float
    issue_slots: float
    microseconds: float
    microseconds_bf16: float
    bound: Bound

    @property
    def speedup(self) -> float:
        return self.microseconds_bf16 / self.microseconds


def expected_slots(shape: LayerShape, num_tokens: int) -> Occupancy:
    """Each token chooses `top_k` distinct experts, all sets equally likely, independently of the other tokens."""
    num_experts, num_others = shape.num_experts, shape.num_experts - shape.top_k
    expert_idle = (num_others / num_experts) ** num_tokens
    slot_idle = (num_others * (num_others - 1) / (num_experts * (num_experts - 1))) ** num_tokens
    num_slots = num_experts / 2
    return Occupancy(
        num_experts * (1 - expert_idle),
        num_slots * 2 * (expert_idle - slot_idle),
        num_slots * (1 - 2 * expert_idle + slot_idle),
    )


def expected_row_tiles(shape: LayerShape, num_tokens: int, tokens: int) -> float:
    """Token tiles of `tokens` rows that one expert needs, partly filled ones included; its rows are binomial."""
    if shape.top_k == shape.num_experts:
        return float(-(-num_tokens // tokens))
    chosen = log(shape.top_k / shape.num_experts)
    not_chosen = log(1 - shape.top_k / shape.num_experts)
    total = 0.0
    for rows in range(1, num_tokens + 1):
        # Through logarithms, since the binomial coefficients of many tokens overflow a float.
        ways = lgamma(num_tokens + 1) - lgamma(rows + 1) - lgamma(num_tokens - rows + 1)
        total += exp(ways + rows * chosen + (num_tokens - rows) * not_chosen) * -(-rows // tokens)
    return total


def predict(
    device: Device,
    shape: LayerShape,
    num_tokens: int,
    tile: Tile,
    costs: Costs,
    num_kernels: int = NUM_KERNELS,
) -> Prediction:
    """Gate-up and down together, for packed and for BF16."""
    occupancy = expected_slots(shape, num_tokens)
    active_slots = occupancy.slots_one_member + occupancy.slots_both_members
    row_tiles = shape.num_experts * expected_row_tiles(shape, num_tokens, tile.tokens)
    elements = shape.expert_elements

    # A member's further tiles are charged as programs of one member. Where both members have some, a program for both
    # would do with less, since decoding both is cheaper than decoding one twice.
    both = occupancy.slots_both_members if tile.members == 2 else 0.0
    one = row_tiles - 2 * both
    packed = Instructions(
        elements * (both * costs.both.alu + one * costs.one.alu),
        elements * (both * costs.both.half + one * costs.one.half),
        elements * (both * costs.both.issued + one * costs.one.issued),
    )
    bf16 = Instructions(alu=0, half=0, issued=elements * row_tiles * costs.bf16_issued)

    # Inputs and outputs once for a token; inner values and results of the down product twice for each of its choices.
    activations = 2 * num_tokens * (shape.hidden_size + shape.top_k * (shape.intermediate_size + shape.hidden_size))
    bytes_packed = BYTES_PER_ELEMENT * (active_slots * elements + activations)
    bytes_bf16 = BYTES_PER_ELEMENT * (occupancy.active_experts * elements + activations)
    flops = 2 * elements * row_tiles * tile.tokens
    packed_times = _microseconds(device, bytes_packed, flops, packed)
    bf16_times = _microseconds(device, bytes_bf16, flops, bf16)
    bound = max(packed_times, key=packed_times.__getitem__)
    overhead = num_kernels * MICROSECONDS_PER_KERNEL
    return Prediction(
        device=device,
        shape=shape,
        num_tokens=num_tokens,
        tile=tile,
        active_slots=active_slots,
        active_experts=occupancy.active_experts,
        bytes_packed=bytes_packed,
        bytes_bf16=bytes_bf16,
        issue_slots=packed.issued / device.warp_size,
        microseconds=packed_times[bound] + overhead,
        microseconds_bf16=max(bf16_times.values()) + overhead,
        bound=bound,
    )


def predictions(plan: Plan) -> list[Prediction]:
    """All devices, shapes and numbers of tokens."""
    return [
        predict(device, shape, num_tokens, *plan(device, shape, num_tokens))
        for shape in GPU_SHAPES
        for num_tokens in NUM_TOKENS
        for device in DEVICES
    ]


def markdown(predictions: Sequence[Prediction]) -> str:
    """A table per shape. A cell is microseconds of packed and its speed-up, and what bounds it unless memory does."""
    lines = [
        "**A model, not a measurement**: nothing below was timed on a GPU. It assumes:",
        "",
        *(f"- {sentence}" for sentence in ASSUMPTIONS),
        "",
        "Cells are µs for packed (speed-up over BF16 in the same model; millions of warp instructions issued in the "
        "main loops), with the bound where it is not memory. "
        "MB are those moved through HBM.",
    ]
    devices = list(dict.fromkeys(prediction.device for prediction in predictions))
    heads = ["tokens", "active slots", "MB packed", "MB BF16", *(device.name for device in devices)]
    for shape in dict.fromkeys(prediction.shape for prediction in predictions):
        title = f"{shape.num_experts} experts, top {shape.top_k}, {shape.hidden_size} x {shape.intermediate_size}"
        lines += ["", f"**{shape.name}** ({title}), modelled", ""]
        lines += [f"| {' | '.join(heads)} |", "|" + "---:|" * len(heads)]
        rows: dict[int, dict[Device, Prediction]] = {}
        for prediction in predictions:
            if prediction.shape == shape:
                rows.setdefault(prediction.num_tokens, {})[prediction.device] = prediction
        for num_tokens, row in rows.items():
            any_device = next(iter(row.values()))
            cells = [
                str(num_tokens),
                f"{any_device.active_slots:.1f}",
                f"{any_device.bytes_packed / 1e6:,.0f}",
                f"{any_device.bytes_bf16 / 1e6:,.0f}",
                *(_cell(row[device]) for device in devices),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _microseconds(device: Device, num_bytes: float, flops: float, instructions: Instructions) -> dict[Bound, float]:
    """How long each resource is busy."""
    sm_clocks_per_microsecond = device.num_sms * device.clock_ghz * 1e3
    issue_lanes = device.schedulers * device.warp_size
    return {
        "memory": num_bytes / (device.hbm_gb_per_s * 1e3 * MEMORY_EFFICIENCY),
        "tensor": flops / (device.bf16_tflops * 1e6 * TENSOR_EFFICIENCY),
        "alu": instructions.alu / (sm_clocks_per_microsecond * device.alu_lanes),
        "half": instructions.half / (sm_clocks_per_microsecond * device.half_lanes),
        "issue": instructions.issued / (sm_clocks_per_microsecond * issue_lanes),
    }


def _cell(prediction: Prediction) -> str:
    bound = "" if prediction.bound == "memory" else f", {prediction.bound}"
    issued = prediction.issue_slots / 1e6
    return f"{prediction.microseconds:,.1f} ({prediction.speedup:.2f}x; {issued:,.0f} M{bound})"
