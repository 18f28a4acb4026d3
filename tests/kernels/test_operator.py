"""The operator's contract, which every engine keeps."""

import re
import subprocess
import sys

import pytest
import torch

from tests.kernels.cases import (
    Case,
    check_ids_and_weights_of_other_types,
    check_ids_of_minus_one,
    check_what_is_not_finite,
)
from tests.kernels.coded_cases import STAYING
from tests.kernels.engines import CPU_ENGINES, DTYPES, HERE, ON_CPU
from vllm_puzzle.kernels import REFERENCE, packed_moe


@pytest.mark.parametrize(("engine", "dtype"), DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("on_input", [False, True])
def test_dtypes_and_activations(engine: str, dtype: torch.dtype, activation: str, on_input: bool) -> None:
    Case(num_tokens=9, dtype=dtype).check(activation, on_input, engine)


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_every_number_of_rows_a_member_can_have(engine: str) -> None:
    """The kernels differ by how many tokens the members of a slot have; here is every mix of few, and some of many."""
    counts = [(a, b) for a in range(14) for b in range(14)] + [(33, 0), (0, 47), (64, 1), (5, 40), (200, 31)]
    for first, second in counts:
        case = Case(num_tokens=first + second, num_experts=2, pairs=1, top_k=1, seed=first * 100 + second)
        case.topk_ids[:first], case.topk_ids[first:] = 0, 1
        case.check(engine=engine)


@pytest.mark.parametrize("engine", HERE)
def test_ids_of_minus_one_are_skipped(engine: str) -> None:
    check_ids_of_minus_one(Case(num_tokens=6), engine)


@pytest.mark.parametrize("engine", HERE)
def test_experts_of_other_ranks_are_skipped(engine: str) -> None:
    case = Case(num_tokens=6)
    local = [0, 3]
    case.slot_of_expert = case.slots.slot_of_expert(local)
    case.w13, case.w2 = case.w13[local], case.w2[local]
    case.check(engine=engine)


@pytest.mark.heavy
@pytest.mark.parametrize(("engine", "dtype"), DTYPES)
@pytest.mark.parametrize("on_input", [False, True])
def test_what_is_not_finite(engine: str, dtype: torch.dtype, on_input: bool) -> None:
    """NaN and infinities do not come through where a choice is skipped, nor into the rows of other tokens."""
    # What a call leaves in memory, here NaN, is not what the next one reads.
    dirty = Case(num_tokens=20, num_experts=4, pairs=2, hidden_size=40, dtype=dtype)
    dirty.x[:] = torch.nan
    dirty.run("silu", on_input, engine)
    case = Case(num_tokens=13, num_experts=4, pairs=2, hidden_size=40, dtype=dtype)
    check_what_is_not_finite(case, lambda: case.run("silu", on_input, engine))


@pytest.mark.parametrize("engine", HERE)
def test_all_tokens_on_one_expert_and_none(engine: str) -> None:
    case = Case(num_tokens=170, top_k=1)
    case.topk_ids[:] = 5
    case.check(engine=engine)
    assert Case(num_tokens=0).run(engine=engine).shape == (0, 32)


@pytest.mark.parametrize("engine", HERE)
def test_one_expert_chosen_twice_by_a_token(engine: str) -> None:
    case = Case(num_tokens=3, top_k=4)
    case.topk_ids[1] = 6
    case.check(engine=engine)


@pytest.mark.parametrize("engine", HERE)
def test_ids_and_weights_of_other_types(engine: str) -> None:
    check_ids_and_weights_of_other_types(Case(num_tokens=6), engine)


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_the_number_of_threads_changes_nothing(engine: str) -> None:
    case = Case(num_tokens=50, num_experts=12, pairs=6, top_k=4, hidden_size=160, intermediate_size=96)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(case.run(engine=engine))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("engine", HERE)
def test_slots_without_tokens_are_not_read(engine: str) -> None:
    case = Case(num_tokens=4)
    expected = case.run(engine=engine)
    used = {int(code) // 2 for code in case.slot_of_expert[case.topk_ids.long()].flatten()}
    unused = [slot for slot in range(case.slots.num_slots) if slot not in used]
    assert unused
    # 0x7FFF would decode to numbers that no sum could hide.
    case.w13[unused], case.w2[unused] = 0x7FFF, 0x7FFF
    assert torch.equal(case.run(engine=engine), expected)


@pytest.mark.parametrize("engine", HERE)
def test_inputs_stay_as_they_are(engine: str) -> None:
    case = Case()
    before = [case.x.clone(), case.topk_weights.clone(), case.topk_ids.clone()]
    case.run(on_input=True, engine=engine)
    assert all(torch.equal(a, b) for a, b in zip(before, [case.x, case.topk_weights, case.topk_ids], strict=True))


@pytest.mark.parametrize("engine", HERE)
def test_it_is_a_well_formed_operator(engine: str) -> None:
    arguments = (*Case().tensors(engine), "silu", False, engine)
    torch.library.opcheck(torch.ops.vllm_puzzle.packed_moe.default, arguments)


def test_it_compiles_into_one_graph_for_any_number_of_tokens() -> None:
    case = Case(num_tokens=7, dtype=torch.float32)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def layer(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.ops.vllm_puzzle.packed_moe(x, case.w13, case.w2, case.slot_of_expert, weights, ids, "silu") + x

    for count in (7, 4, 2):
        x, weights, ids = case.x[:count], case.topk_weights[:count], case.topk_ids[:count]
        expected = packed_moe(x, case.w13, case.w2, case.slot_of_expert, weights, ids, "silu") + x
        assert torch.equal(layer(x, weights, ids), expected)


def test_misfits_are_refused_with_their_shapes() -> None:
    case = Case()
    with pytest.raises(ValueError, match="activation 'relu' is not supported"):
        case.run("relu")
    x, w13, w2, *rest = case.tensors(REFERENCE)
    with pytest.raises(ValueError, match=r"w2 \[5, 32, 23\]"):
        packed_moe(x, w13, w2[:, :, 1:], *rest, "silu")
    case = Case()
    case.topk_weights = case.topk_weights[1:]
    with pytest.raises(ValueError, match=r"topk_weights \[4, 2\]"):
        case.run()


@pytest.mark.parametrize("engine", CPU_ENGINES)
def test_what_compiled_code_would_trust_is_refused(engine: str) -> None:
    def call(**changed: torch.Tensor) -> None:
        case = Case()
        w13, w2 = case.weights(engine)
        arguments = {
            "x": case.x,
            "w13": w13,
            "w2": w2,
            "slot_of_expert": case.slot_of_expert,
            "topk_weights": case.topk_weights,
            "topk_ids": case.topk_ids,
        }
        packed_moe(**{**arguments, **changed}, activation="silu", engine=engine)

    case = Case()
    w2 = case.weights(engine)[1]
    call()
    with pytest.raises(ValueError, match=r"w13 \[5, 48, 32\].*rounded up to 32"):
        call(w13=case.w13, w2=case.w2)
    with pytest.raises(ValueError, match="topk_ids holds 8, there are 8 experts"):
        call(topk_ids=case.topk_ids.clamp(min=8))
    with pytest.raises(ValueError, match=r"topk_ids \(torch.int16, cpu\); expected"):
        call(topk_ids=case.topk_ids.short())
    with pytest.raises(ValueError, match=r"slot_of_expert \(torch.int64, cpu\)"):
        call(slot_of_expert=case.slot_of_expert.long())
    with pytest.raises(ValueError, match=r"w2 \(torch.int32, cpu\)"):
        call(w2=w2.int())
    with pytest.raises(ValueError, match=r"x \(torch.float64, cpu\)"):
        call(x=case.x.double())
    with pytest.raises(ValueError, match=r"w2 \(torch.int16, cpu, not contiguous\)"):
        call(w2=torch.cat([w2, w2])[::2])


NOT_LOADED = r"ValueError: the packed experts cannot be computed: {}, so its weights .*load them again"
SAID = {
    "w13 on meta": NOT_LOADED.format(r"w13 \[5, \d+, 32\] is on the meta device"),
    "w2 on meta": NOT_LOADED.format(r"w2 \[5, 32, \d+\] is on the meta device"),
    "slot_of_expert on meta": NOT_LOADED.format(r"slot_of_expert \[8\] is on the meta device"),
    "w13 freed": NOT_LOADED.format(r"w13 \[5, \d+, 32\] has lost its memory"),
    "w2 freed": NOT_LOADED.format(r"w2 \[5, 32, \d+\] has lost its memory"),
    "slot_of_expert freed": NOT_LOADED.format(r"slot_of_expert \[8\] has lost its memory"),
    "w13 cut off": NOT_LOADED.format(r"w13 \[5, \d+, 32\] has lost its memory"),
    "slot beyond the last": r"ValueError: slot_of_expert holds 18, 5 slots have codes 0 to 9",
    "random slots": r"ValueError: slot_of_expert holds 2139062143, 5 slots have codes 0 to 9",
    "fewer slots in w2": r"ValueError: shapes do not fit: .*w2 \[4, ",
    "fewer slots than the table": r"ValueError: slot_of_expert holds 8, 1 slots have codes 0 to 1",
    "expert beyond the last": r"ValueError: topk_ids holds \d+, there are 8 experts",
}
MADE_FOR_A_CALL = ("x", "topk_ids", "topk_weights")
CODED_NOT_LOADED = r"ValueError: the coded experts cannot be computed: {} \[.*\] {}, so its weights .*load them again"
CODED_SAID = {
    **{f"{name} on meta": CODED_NOT_LOADED.format(name, "is on the meta device") for name in (*STAYING, "expert_map")},
    **{f"{name} freed": CODED_NOT_LOADED.format(name, "has lost its memory") for name in (*STAYING, "expert_map")},
    "w2_codes cut off": CODED_NOT_LOADED.format("w2_codes", "has lost its memory"),
    "place beyond the last": "ValueError: expert_map holds 17, there are 8 experts here",
    "random places": "ValueError: expert_map holds 2139062143, there are 8 experts here",
    "random index": r"ValueError: w13_index sends expert \d to byte 9187201950435737471 with codes of",
    "negative index": r"ValueError: w2_index sends expert \d to byte -\d+ with codes of \d bits",
    "unknown widths": r"ValueError: w2_index sends expert \d to byte \d+ with codes of 0 bits",
    "fewer codes": r"ValueError: w13_index sends expert \d .*, and w13_codes has 64 bytes",
    "fewer scales": r"ValueError: shapes do not fit: w2_scale \[7, ",
    "expert beyond the last": r"ValueError: topk_ids holds \d+, there are 8 experts",
}
FREED_FOR_A_CALL = {f"{name} freed": f"ValueError: the memory of {name} was freed" for name in MADE_FOR_A_CALL}
SAID_BY_COMPILED_CODE = {
    "preparing meta": r"ValueError: w13 must be contiguous int16 words on the CPU .* on meta",
    "preparing freed": r"ValueError: w13 must be .* with 0 bytes of memory",
    "no memory": r"RuntimeError: .*alloc",
    "after all that": "as before",
}


@pytest.mark.heavy
@pytest.mark.parametrize("engine", ON_CPU)
def test_no_state_ends_the_process(engine: str) -> None:
    """A slot out of range or a weight without memory is an error of this call, and the next one computes again."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.bad_states", engine], capture_output=True, text=True, check=False
    )
    said = dict(line.split("\t") for line in run.stdout.splitlines())
    assert run.returncode == 0, f"after {list(said)[-1:]}: {run.stderr[-2000:]}"
    compiled = engine != REFERENCE
    of_coded = {**CODED_SAID, **(FREED_FOR_A_CALL if compiled else {})}
    expected = {
        **SAID,
        **(FREED_FOR_A_CALL if compiled else {}),
        **{f"coded: {state}": message for state, message in of_coded.items()},
        **(SAID_BY_COMPILED_CODE if compiled else {}),
    }
    assert list(said) == list(expected)
    for state, message in expected.items():
        assert re.match(message, said[state]), f"{state}: {said[state]}"


def test_a_level_computes_only_its_own_dtypes() -> None:
    for engine in CPU_ENGINES[1:]:
        with pytest.raises(ValueError, match=rf"types do not fit {engine}: x \(torch.float32, cpu\)"):
            Case(dtype=torch.float32).run(engine=engine)


def test_unknown_engines_are_refused() -> None:
    case = Case()
    with pytest.raises(ValueError, match="engine 'abacus' is not one of"):
        packed_moe(
            case.x, case.w13, case.w2, case.slot_of_expert, case.topk_weights, case.topk_ids, "silu", engine="abacus"
        )
