"""The Triton engine without a GPU: its machine code, held against budgets, and a model of its time.

    python -m benchmarks.gpu_static --json FILE

Every default configuration is compiled ahead of time for the GPUs it is meant for, also with its sums split in two and
for float16, and the main loops are read in the machine code: `benchmarks.machine_code` says how instructions are
counted, `benchmarks.gpu_rows` what is held against what. With `--targets` only those are compiled, and nothing is
modelled. Exit status 1 if a budget is missed.
"""

import argparse
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tqdm import tqdm

from benchmarks.gpu_compile import compile_surroundings
from benchmarks.gpu_devices import Device
from benchmarks.gpu_rows import CHIPS, Row, cases, measure
from benchmarks.roofline import Costs, Instructions, MoEShape, Tile, markdown, predictions
from vllm_puzzle.kernels.triton.configs import find_config
from vllm_puzzle.kernels.triton.target import INTERPRETED, Target


def plan(rows: list[Row], device: Device, shape: MoEShape, num_tokens: int) -> tuple[Tile, Costs]:
    """The tile that the engine takes, and the costs of its main loops, gate-up weighing twice as much as down."""
    family = next(family for family, chip in CHIPS.items() if chip.gpu.arch == device.target)
    target = Target(family, "none", device.num_sms, ptx=CHIPS[family].gpu.backend == "cuda")
    sizes = (shape.num_experts, shape.num_experts // 2, shape.hidden_size, shape.intermediate_size, shape.top_k)
    config = find_config(target, *sizes, num_tokens)
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


def table(rows: list[Row]) -> str:
    """The rows of unsplit sums in bfloat16 as a table in Markdown, member 0 and 1 as the larger of the two."""
    heads = ["target", "tokens per expert", "product", "tile", "decoded", "integer", "half", "all", "bytes", "loads"]
    heads += ["stores", "tensor", "registers", "shared KB", "programs (stated)", "occupancy"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        if row.dtype != "bfloat16" or row.config["split_k"] > 1 or row.member == "0":
            continue
        config = row.config
        cells = [
            row.target,
            f"to {row.tokens_per_expert}",
            row.kernel.removesuffix("_kernel"),
            f"{config['block_rows']} x {config['block_tokens']} x {config['block_k']}, {config['num_warps']} warps, "
            f"{config['num_stages']} stages",
            {"1": "one", "both": "both"}[row.member],
            f"{row.alu_per_element:.2f}",
            f"{row.half_per_element:.2f}",
            f"{row.issued_per_element:.2f}",
            f"{row.bytes_per_element:.2f} + {row.activation_bytes_per_element:.2f}",
            f"{row.load_bytes} B",
            str(row.operand_stores),
            row.tensor_instruction.split(".")[0],
            str(row.registers),
            f"{row.shared_bytes / 1024:.0f}",
            f"{row.programs_per_sm} ({row.stated_programs_per_sm})",
            f"{row.occupancy:.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=CHIPS, metavar="TARGET", help=f"some of {', '.join(CHIPS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and predictions here")
    arguments = parser.parse_args()
    if INTERPRETED:
        print("TRITON_INTERPRET is set, so that nothing would be compiled; unset it", file=sys.stderr)
        return 1
    targets = arguments.targets or list(CHIPS)
    chosen = [case for case in cases() if case[0] in targets]
    rows = [row for case in tqdm(chosen, desc="compiling", unit="config") for row in measure(*case)]
    print(table(rows))
    model = [] if arguments.targets else predictions(partial(plan, rows))
    if model:
        print(f"\n{markdown(model)}")
    others = [
        {"target": target, "kernel": name, "registers": code.registers, "spill_bytes": code.spill_bytes}
        for target in tqdm(targets, desc="compiling the other kernels", unit="target")
        for name, code in compile_surroundings(CHIPS[target].gpu)
    ]
    if arguments.json:
        modelled = [{**asdict(prediction), "speedup": prediction.speedup} for prediction in model]
        document = {"rows": [asdict(row) for row in rows], "other_kernels": others, "roofline_model": modelled}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    spilling = [other for other in others if other["spill_bytes"]]
    for other in spilling:
        print(f"{other['target']} {other['kernel']}: spills {other['spill_bytes']} bytes")
    print(f"{len(spilling)} of the {len(others)} kernels around the products spill.")
    missed = [row for row in rows if row.misses]
    for row in missed:
        print(f"{row.target} {row.kernel} {row.dtype} {row.config} member {row.member}: {', '.join(row.misses)}")
    print(f"{len(rows) - len(missed)} of {len(rows)} main loops are within their budgets.")
    half = [row for row in rows if row.dtype == "float16" and CHIPS[row.target].gpu.backend == "cuda"]
    if half:
        one, both = (max(row.alu_per_element for row in half if row.members == members) for members in (1, 2))
        print(
            f"float16, which has no budget of integer instructions: up to {one:.2f} for one member, {both:.2f} for two."
        )
    return 1 if missed or spilling else 0


if __name__ == "__main__":
    sys.exit(main())
