"""From the counts of machine code to the costs that the roofline model takes."""

from benchmarks.gpu_static.chips import CHIPS
from benchmarks.gpu_static.devices import Device
from benchmarks.gpu_static.roofline import Costs, Instructions, Tile
from benchmarks.gpu_static.rows import Row
from vllm_puzzle.kernels.triton.configs import find_config
from vllm_puzzle.kernels.triton.target import Target
from vllm_puzzle.tuning.shape import LayerShape


def plan(rows: list[Row], device: Device, shape: LayerShape, num_tokens: int) -> tuple[Tile, Costs]:
    """The tile that the engine takes, and the costs of its main loops, gate-up weighing twice as much as down."""
    family = next(family for family, chip in CHIPS.items() if chip.gpu.arch == device.target)
    target = Target(family, "none", device.num_sms, ptx=CHIPS[family].gpu.backend == "cuda")
    config = find_config(target, shape.call_sizes(num_tokens))
    tile = Tile(config.members, config.block_tokens)
    loops = [
        row
        for row in rows
        if (row.target, row.dtype, row.config["split_k"]) == (family, "bfloat16", 1)
        and (row.config["members"], row.config["block_tokens"]) == tile
    ]
    one = _mean([row for row in loops if row.members == 1])
    both = _mean([row for row in loops if row.members == 2]) if tile.members == 2 else one
    return tile, Costs(one=one, both=both, bf16_issued=one.issued - one.alu - one.half)


def _mean(rows: list[Row]) -> Instructions:
    weights = [2 if row.kernel == "gate_up_kernel" else 1 for row in rows]

    def mean(values: list[float]) -> float:
        return sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)

    return Instructions(
        alu=mean([row.alu_per_element for row in rows]),
        half=mean([row.half_per_element for row in rows]),
        issued=mean([row.issued_per_element for row in rows]),
    )
