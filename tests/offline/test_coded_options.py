"""What goes with `--bits`, what does not, and what is then done."""

from pathlib import Path
from typing import Any

import pytest

from vllm_puzzle.offline.checkpoints.families import FAMILIES
from vllm_puzzle.offline.checkpoints.shape import MoEShape
from vllm_puzzle.offline.conversion.estimate import Speed
from vllm_puzzle.offline.conversion.methods import open_methods
from vllm_puzzle.offline.conversion.options import ConvertOptions
from vllm_puzzle.offline.conversion.work import Work
from vllm_puzzle.offline.errors import CheckpointError

TEXT = Path("text")
SHAPE = MoEShape(FAMILIES["MixtralForCausalLM"], 8, 4096, 2048, 4, (0, 1, 2, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1.9}, "--bits 1.9 is outside 2 to 4"),
        ({"bits": 4.5}, "--bits 4.5 is outside 2 to 4"),
        ({"bits": float("nan")}, "--bits nan is outside 2 to 4"),
        ({"bits": 3, "compression": 50.0}, "--compression 50.0 is for pairs, and --bits 3 asks for codes; leave out"),
        ({"bits": 3, "pairing": "random"}, "--pairing random is for pairs"),
        ({"bits": 3, "align": True}, "--align is for pairs"),
        ({"bits": 3, "align": False}, "--no-align is for pairs"),
        ({"bits": 3, "tau": 0.4}, "--tau 0.4 is for pairs"),
        ({"bits": 3, "max_expert_parallel": 2}, "--max-expert-parallel 2 is for pairs"),
        ({"bits": 3, "rule": "paper"}, "--rule paper is for pairs"),
        ({"bits": 3, "seed": 4}, "--seed 4 draws pairs, and --bits 3 asks for codes; leave out"),
        ({"even": True}, "--even is for codes; give --bits B, from 2 to 4"),
        ({"rule": "codebook"}, "--rule codebook is for codes; give --bits B, from 2 to 4"),
        ({"bits": 3, "calibration": TEXT, "jobs": 2}, "--jobs 2 with --bits and --calibration: .* leave out --jobs"),
        ({"bits": 3, "calibration": TEXT, "ray": "auto"}, "--ray auto with --bits and --calibration"),
    ],
)
def test_what_does_not_go_with_codes_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ConvertOptions(**options)


@pytest.mark.parametrize(
    ("options", "surveys", "sequential"),
    [
        ({"bits": 3, "rule": "codebook", "jobs": 4}, False, False),
        ({"bits": 3, "calibration": TEXT}, True, True),
        ({"bits": 3, "calibration": TEXT, "even": True}, False, True),
        ({"bits": 2.3}, True, False),
        ({"bits": 2.3, "calibration": TEXT, "even": True}, True, True),
    ],
)
def test_a_budget_is_spent_where_there_is_a_choice(options: dict[str, Any], surveys: bool, sequential: bool) -> None:
    (method,) = open_methods(ConvertOptions(**options), SHAPE)
    assert (method.rule, method.surveys, method.sequential) == ("codebook", surveys, sequential)
    assert method.expert_ranks(8) == 8
    assert method.num_pairs == 0


def test_experts_that_cannot_be_paired_can_be_coded() -> None:
    lone = MoEShape(FAMILIES["MixtralForCausalLM"], 1, 96, 40, 1, (0,))
    with pytest.raises(CheckpointError, match="does not cut 1 experts"):
        open_methods(ConvertOptions(), lone)
    assert open_methods(ConvertOptions(bits=2), lone)[0].expert_bytes(lone) > 0


def test_more_bits_take_more_bytes_and_calibration_more_time() -> None:
    def method(bits: float, text: Path | None = None) -> Any:
        return open_methods(ConvertOptions(bits=bits, calibration=text), SHAPE)[0]

    sizes = [method(bits).expert_bytes(SHAPE) for bits in (2, 2.25, 2.5, 3, 3.5, 4)]
    assert sizes == sorted(set(sizes))
    assert sizes[1] == pytest.approx((sizes[0] + sizes[2]) / 2, abs=1)
    # Codes of 4 bits, two codebooks of 16 points, and a scale a row of gate, up and down.
    expert = 3 * 4096 * 2048 // 4 + 2 * 16 * 4 + 2 * (2048 + 2048 + 4096)
    assert sizes[0] == 4 * 8 * expert
    blind = Work(SHAPE, num_tokens=0, top_k=2, layer_bytes=10**8, dense_weights=10**8)
    seen = Work(SHAPE, num_tokens=1 << 16, top_k=2, layer_bytes=10**8, dense_weights=10**8)
    speed = Speed(1e11, 1e9)
    few, many = method(3).estimate(blind, speed), method(3, TEXT).estimate(seen, speed)
    assert few.seconds < many.seconds
    assert few.num_bytes < many.num_bytes
    on_gpu = Work(SHAPE, num_tokens=1 << 16, top_k=2, layer_bytes=10**8, dense_weights=10**8, on_gpu=True)
    assert method(3, TEXT).estimate(on_gpu, speed).seconds > many.seconds
