"""The program that reads machine code: rows of compiled kernels, in processes where Triton compiles."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.gpu_static.chips import CHIPS
from benchmarks.gpu_static.costs import plan
from benchmarks.gpu_static.devices import DEVICES
from benchmarks.gpu_static.roofline import markdown, predictions
from benchmarks.gpu_static.rows import Row
from benchmarks.gpu_static.table import table
from benchmarks.shapes import QWEN3_30B_A3B

SCRIPT = """
import json, sys
from dataclasses import asdict, replace
from benchmarks.gpu_static.rows import cases, measure
family, change = sys.argv[1], json.loads(sys.argv[2])
case = next(case for case in cases() if case.family == family)
products = {name: getattr(case.config, name).model_copy(update=change) for name in ("gate_up", "down")}
changed = replace(case, config=case.config.model_copy(update=products))
print(json.dumps([asdict(row) for row in measure(changed)]))
"""


SURROUNDINGS = """
import itertools, json, sys
from benchmarks.gpu_static.compiling import compile_surroundings
from benchmarks.gpu_static.chips import CHIPS
# Those for few slots; more slots take longer to compile.
codes = itertools.islice(compile_surroundings(CHIPS[sys.argv[1]].gpu), 10)
print(json.dumps([(name, code.spill_bytes) for name, code in codes]))
"""


def compiling(script: str, *arguments: str) -> Any:
    """What a script prints, in a process where Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def measured(family: str, **change: Any) -> list[Row]:
    """Rows of the family's configuration for the fewest tokens, with something changed."""
    return [Row(**row) for row in compiling(SCRIPT, family, json.dumps(change))]


@pytest.mark.parametrize("family", ["sm80", "sm90", "sm100", "gfx942"])
def test_the_configuration_for_few_tokens_keeps_its_budgets(family: str) -> None:
    rows = measured(family)
    assert [(row.kernel, row.member) for row in rows] == [
        (kernel, member) for kernel in ("gate_up_kernel", "down_kernel") for member in ("0", "1", "both")
    ]
    assert not [row for row in rows if row.misses]
    if family != "gfx942":
        # The decoder alone takes 1, 1.5 and 2 of them, and one multiplication for two elements.
        assert all(1.0 < row.alu_per_element <= 2.0 for row in rows if row.member == "0")
        assert all(1.5 < row.alu_per_element <= 2.0 for row in rows if row.member == "1")
        assert all(2.0 < row.alu_per_element <= 5.0 for row in rows if row.member == "both")
        assert {row.half_per_element for row in rows if row.members == 1} == {0.5}
        assert {(row.bytes_per_element, row.load_bytes, row.operand_stores) for row in rows} == {(2.0, 16, 0)}


def test_the_other_kernels_compile_without_spills() -> None:
    kernels = compiling(SURROUNDINGS, "sm90")
    assert {name for name, _ in kernels} == {"count", "place", "activate", "combine"}
    assert not any(spill_bytes for _, spill_bytes in kernels)


def test_what_misses_a_budget_is_named() -> None:
    rows = measured("sm90", block_k=16, num_warps=1, programs_per_sm=33)
    misses = {miss.split(" ", 1)[1] for row in rows for miss in row.misses}
    assert "integer instructions" in misses
    assert "programs a multiprocessor" in misses
    assert any("bytes" in miss for miss in misses)


def test_programs_are_limited_by_what_they_share() -> None:
    hopper = CHIPS["sm90"]
    assert hopper.programs(registers=32, shared_bytes=0, num_warps=4) == 16
    assert hopper.programs(registers=161, shared_bytes=0, num_warps=4) == 3
    assert hopper.programs(registers=32, shared_bytes=113 * 1024, num_warps=4) == 2
    assert CHIPS["gfx942"].programs(registers=256, shared_bytes=0, num_warps=4) == 2


def test_the_model_takes_the_engine_s_tiles_and_the_rows_costs() -> None:
    rows = []
    for family, tiles in {
        "sm80": [(2, 16), (2, 32), (1, 64)],
        "sm90": [(2, 8), (2, 16), (2, 32), (1, 64)],
        "sm100": [(2, 8), (2, 16), (2, 32), (1, 64)],
        "gfx942": [(2, 16), (1, 64)],
    }.items():
        for members, tokens in tiles:
            for member in ("0", "1", "both")[: members + 1]:
                for kernel in ("gate_up_kernel", "down_kernel"):
                    rows.append(a_row(family, kernel, members, tokens, member))
    device, shape = DEVICES[1], QWEN3_30B_A3B
    tile, costs = plan(rows, device, shape, 1)
    assert tile == (2, 8)
    # Member 0 costs 1, member 1 costs 2 and both cost 3, gate-up; down costs one more, and half weight.
    assert costs.one.alu == pytest.approx((2 * 1.5 + 2.5) / 3)
    assert costs.both.alu == pytest.approx((2 * 3 + 4) / 3)
    text = markdown(predictions(lambda *arguments: plan(rows, *arguments)))
    assert "not a measurement" in text
    assert len(table(rows).splitlines()) == 2 + sum(row.member != "0" for row in rows)


def a_row(family: str, kernel: str, members: int, tokens: int, member: str) -> Row:
    alu = {"0": 1.0, "1": 2.0, "both": 3.0}[member] + (kernel == "down_kernel")
    shape = {"block_rows": 128, "block_k": 64, "split_k": 1, "num_warps": 4, "num_stages": 3}
    return Row(
        target=family,
        kernel=kernel,
        dtype="bfloat16",
        tokens_per_expert=1,
        config={"members": members, "block_tokens": tokens, **shape},
        members=2 if member == "both" else 1,
        member=member,
        alu_per_element=alu,
        half_per_element=0.5,
        issued_per_element=6.0,
        bytes_per_element=2.0,
        activation_bytes_per_element=0.1,
        load_bytes=16,
        operand_stores=0,
        tensor_instruction="HGMMA.64x16x16",
        registers=100,
        spill_bytes=0,
        shared_bytes=2**16,
        programs_per_sm=2,
        stated_programs_per_sm=2,
        occupancy=0.1,
        misses=[],
    )
