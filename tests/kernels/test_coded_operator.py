"""The contract of `coded_moe`, which every engine that reads codes keeps."""

from dataclasses import replace

import pytest
import torch

from tests.kernels.cases import check_ids_and_weights_of_other_types, check_ids_of_minus_one, check_what_is_not_finite
from tests.kernels.coded_cases import CodedCase
from tests.kernels.engines import CODED, CODED_CPU, CODED_DTYPES
from vllm_puzzle.format import CODE_BITS
from vllm_puzzle.kernels import ENGINES, REFERENCE, Engine, EngineError, choose_engine, coded_moe


@pytest.mark.parametrize(("engine", "dtype"), CODED_DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("on_input", [False, True])
def test_dtypes_and_activations(engine: str, dtype: torch.dtype, activation: str, on_input: bool) -> None:
    CodedCase(num_tokens=9, dtype=dtype).check(activation, on_input, engine)


@pytest.mark.parametrize("engine", CODED)
@pytest.mark.parametrize("bits", CODE_BITS)
def test_widths_and_sizes(engine: str, bits: int) -> None:
    """Odd sizes, and those of several blocks."""
    for num_tokens, hidden_size, intermediate_size in [(1, 1, 1), (2, 31, 3), (3, 65, 33), (6, 128, 64), (40, 34, 50)]:
        case = CodedCase(num_tokens, 3, 2, hidden_size, intermediate_size, seed=bits, widths=(bits,))
        if hidden_size == 1:
            case.make_positive()
        case.check(engine=engine)


@pytest.mark.parametrize("engine", CODED)
def test_ids_of_minus_one_are_skipped(engine: str) -> None:
    check_ids_of_minus_one(CodedCase(num_tokens=6), engine)


@pytest.mark.parametrize("engine", CODED)
def test_experts_of_other_ranks_are_skipped(engine: str) -> None:
    case = CodedCase(num_tokens=6)
    case.keep([6, 0, 3])
    assert case.expert_map.tolist().count(-1) == 5
    case.check(engine=engine)
    case.keep([])
    assert not case.run(engine=engine).any()


@pytest.mark.parametrize(("engine", "dtype"), CODED_DTYPES)
@pytest.mark.parametrize("on_input", [False, True])
def test_what_is_not_finite(engine: str, dtype: torch.dtype, on_input: bool) -> None:
    """NaN and infinities do not come through where a choice is skipped, nor into the rows of other tokens."""
    dirty = CodedCase(num_tokens=20, num_experts=4, hidden_size=40, dtype=dtype)
    dirty.x[:] = torch.nan
    dirty.run("silu", on_input, engine)
    case = CodedCase(num_tokens=13, num_experts=4, hidden_size=40, dtype=dtype)
    check_what_is_not_finite(case, lambda: case.run("silu", on_input, engine))


@pytest.mark.parametrize("engine", CODED)
def test_all_tokens_on_one_expert_and_none(engine: str) -> None:
    case = CodedCase(num_tokens=170, top_k=1)
    case.topk_ids[:] = 5
    case.check(engine=engine)
    assert CodedCase(num_tokens=0).run(engine=engine).shape == (0, 33)


@pytest.mark.parametrize("engine", CODED)
def test_ids_and_weights_of_other_types(engine: str) -> None:
    check_ids_and_weights_of_other_types(CodedCase(num_tokens=6), engine)


@pytest.mark.parametrize("engine", CODED)
def test_experts_without_tokens_are_not_read(engine: str) -> None:
    case = CodedCase(num_tokens=3)
    expected = case.run(engine=engine)
    unused = set(range(8)) - set(case.expert_map[case.topk_ids.long()].flatten().tolist())
    assert unused
    tensors = case.named(engine)
    for matrix in ("w13", "w2"):
        tensors[f"{matrix}_codebook"][list(unused)] = torch.nan
        tensors[f"{matrix}_index"][list(unused)] = -1
    # The reference engine, like all, looks at the index of the experts that it decodes.
    assert torch.equal(coded_moe(**tensors, activation="silu", engine=engine), expected)


@pytest.mark.parametrize("engine", CODED)
def test_even_experts_can_change_places(engine: str) -> None:
    """What expert-parallel load balancing does: every tensor but the index moves, expert by expert."""
    case = CodedCase(num_tokens=7, widths=(6,))
    expected = case.run(engine=engine)
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    tensors = case.named(engine)
    for matrix in ("w13", "w2"):
        codes = tensors[f"{matrix}_codes"]
        codes.copy_(codes.view(8, -1)[order].flatten())
        for name in ("codebook", "scale"):
            tensors[f"{matrix}_{name}"].copy_(tensors[f"{matrix}_{name}"][order])
    tensors["expert_map"] = order.argsort()[case.expert_map.long()].int()
    assert torch.equal(coded_moe(**tensors, activation="silu", engine=engine), expected)


@pytest.mark.parametrize("engine", CODED_CPU)
def test_every_number_of_rows_an_expert_can_have(engine: str) -> None:
    """The kernels differ by it; mixed widths go round."""
    for count in (*range(1, 14), 16, 17, 33, 50):
        case = CodedCase(num_tokens=count, num_experts=4, top_k=1, seed=count)
        case.topk_ids[:] = count % 4
        case.check(engine=engine)


@pytest.mark.parametrize("engine", CODED_CPU)
def test_the_number_of_threads_changes_nothing(engine: str) -> None:
    case = CodedCase(num_tokens=50, num_experts=12, top_k=4, hidden_size=160, intermediate_size=96)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(case.run(engine=engine))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("engine", CODED_CPU)
def test_what_compiled_code_would_trust_is_refused(engine: str) -> None:
    tensors = CodedCase().named(engine)

    def call(**changed: torch.Tensor) -> None:
        coded_moe(**{**tensors, **changed}, activation="silu", engine=engine)

    call()
    with pytest.raises(ValueError, match=r"topk_ids \(torch.int16, cpu\); expected"):
        call(topk_ids=tensors["topk_ids"].short())
    with pytest.raises(ValueError, match=r"expert_map \(torch.int64, cpu\)"):
        call(expert_map=tensors["expert_map"].long())
    with pytest.raises(ValueError, match=r"w2_codes \(torch.int8, cpu\)"):
        call(w2_codes=tensors["w2_codes"].view(torch.int8))
    with pytest.raises(ValueError, match=r"w13_scale \(torch.float32, cpu\)"):
        call(w13_scale=tensors["w13_scale"].float())
    with pytest.raises(ValueError, match=r"w2_index \(torch.int32, cpu\)"):
        call(w2_index=tensors["w2_index"].int())
    with pytest.raises(ValueError, match=r"w13_codebook \(torch.bfloat16, cpu, not contiguous\)"):
        call(w13_codebook=tensors["w13_codebook"].repeat(2, 1, 1)[::2])
    with pytest.raises(ValueError, match=r"w13_scale \[8, 32\]"):
        call(w13_scale=tensors["w13_scale"][:, 0])
    w13, w2 = ENGINES[engine].allocate_codes([4] * 2, [5] * 2, 64, 32)
    with pytest.raises(ValueError, match=r"w13 must be codes as the CPU engine allocates them.*\[2, 2, 40\]"):
        ENGINES[engine].prepare_codes(replace(w13, scale=torch.zeros(2, 2, 40, dtype=torch.bfloat16)), w2, 1, 1)
    with pytest.raises(ValueError, match=r"w2 must be codes as the CPU engine allocates them.* on meta"):
        ENGINES[engine].prepare_codes(w13, replace(w2, codes=w2.codes.to("meta")), 1, 1)
    with pytest.raises(ValueError, match="w13 must be codes"):
        ENGINES[engine].prepare_codes(replace(w13, index=w13.index + 64), w2, 1, 1)


@pytest.mark.heavy
@pytest.mark.parametrize("engine", CODED)
def test_it_is_a_well_formed_operator(engine: str) -> None:
    case = CodedCase()
    before = [tensor.clone() for tensor in (case.x, case.topk_weights, case.topk_ids)]
    arguments = (*case.tensors(engine), "silu", True, engine)
    torch.library.opcheck(torch.ops.vllm_puzzle.coded_moe.default, arguments)
    assert all(map(torch.equal, before, (case.x, case.topk_weights, case.topk_ids)))


@pytest.mark.heavy
def test_it_compiles_into_one_graph_for_any_number_of_tokens() -> None:
    case = CodedCase(num_tokens=7, dtype=torch.float32)
    _, *weights, expert_map, _, _ = case.tensors(REFERENCE)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def layer(x: torch.Tensor, topk_weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.ops.vllm_puzzle.coded_moe(x, *weights, expert_map, topk_weights, ids, "silu") + x

    for count in (7, 4, 2):
        x, topk_weights, ids = case.x[:count], case.topk_weights[:count], case.topk_ids[:count]
        expected = coded_moe(x, *weights, expert_map, topk_weights, ids, "silu") + x
        assert torch.equal(layer(x, topk_weights, ids), expected)


@pytest.mark.parametrize("engine", CODED)
def test_misfits_are_refused_with_their_shapes(engine: str) -> None:
    def call(activation: str = "silu", **changed: torch.Tensor) -> None:
        coded_moe(**{**CodedCase().named(engine), **changed}, activation=activation, engine=engine)

    tensors = CodedCase().named(engine)
    call()
    with pytest.raises(ValueError, match="activation 'relu' is not supported; coded_moe knows"):
        call("relu")
    with pytest.raises(ValueError, match=r"w2_scale \[8, 2, \d+\], x \[5, 33\]; expected \[8, 2, \d+\]"):
        call(w2_scale=tensors["w2_scale"][:, :, 1:].contiguous())
    with pytest.raises(ValueError, match=r"w13_codebook \[7, 256, 2\].* expected \[8, 256, 2\]"):
        call(w13_codebook=tensors["w13_codebook"][1:])
    with pytest.raises(ValueError, match=r"topk_weights \[4, 2\]"):
        call(topk_weights=tensors["topk_weights"][1:])
    with pytest.raises(ValueError, match="topk_ids holds 8, there are 8 experts"):
        call(topk_ids=tensors["topk_ids"].clamp(min=8))
    with pytest.raises(ValueError, match="expert_map holds 9, there are 8 experts here"):
        call(expert_map=tensors["expert_map"].clamp(min=9))
    with pytest.raises(ValueError, match=r"w13_index sends expert . to byte 1000000 with codes of . bits"):
        call(w13_index=torch.where(torch.tensor([True, False]), 1000000, tensors["w13_index"]))
    with pytest.raises(ValueError, match=r"w2_index sends expert . to byte .* with codes of 7 bits"):
        call(w2_index=torch.where(torch.tensor([False, True]), 7, tensors["w2_index"]))


class Illiterate(Engine):
    name = family = "illiterate"

    def choose(self, device: torch.device, dtype: torch.dtype) -> Engine:
        return self


def test_engines_that_read_no_codes_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "illiterate", Illiterate())
    refusal = "the engine illiterate does not read coded experts; choose VLLM_PUZZLE_ENGINE=reference"
    with pytest.raises(EngineError, match=refusal):
        coded_moe(*CodedCase().tensors(REFERENCE), "silu", engine="illiterate")
    monkeypatch.setenv("VLLM_PUZZLE_ENGINE", "illiterate")
    assert choose_engine(torch.device("cpu"), torch.bfloat16).name == "illiterate"
    with pytest.raises(EngineError, match=refusal):
        choose_engine(torch.device("cpu"), torch.bfloat16, codes=True)
    monkeypatch.setenv("VLLM_PUZZLE_ENGINE", "reference")
    assert choose_engine(torch.device("cpu"), torch.bfloat16, codes=True).name == "reference"
