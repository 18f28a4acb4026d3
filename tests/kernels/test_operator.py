"""The operator's contract, held against a float64 computation that shares no code with it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from vllm_puzzle.format import LayerSlots, pack, unpack
from vllm_puzzle.kernels import packed_moe

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


def random_words(generator: torch.Generator, *shape: int) -> torch.Tensor:
    magnitude = torch.rand(shape, generator=generator) * 0.2
    masks = [torch.rand(shape, generator=generator) < 0.75 for _ in range(2)]
    signs = [torch.rand(shape, generator=generator) < 0.5 for _ in range(2)]
    return pack(magnitude, masks, signs)


class Case:
    """Random packed experts, tokens and routing."""

    def __init__(
        self,
        num_tokens: int = 5,
        num_experts: int = 8,
        pairs: int = 3,
        top_k: int = 2,
        hidden_size: int = 32,
        intermediate_size: int = 24,
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(num_experts, generator=generator).tolist()
        self.slots = LayerSlots(layer=0, experts=order, pairs=pairs)
        self.w13 = random_words(generator, self.slots.num_slots, 2 * intermediate_size, hidden_size)
        self.w2 = random_words(generator, self.slots.num_slots, hidden_size, intermediate_size)
        self.slot_of_expert = self.slots.slot_of_expert()
        self.x = torch.randn(num_tokens, hidden_size, generator=generator).to(dtype)
        self.topk_weights = torch.rand(num_tokens, top_k, generator=generator)
        chosen = [torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(num_tokens)]
        self.topk_ids = torch.stack(chosen).int() if chosen else torch.empty(0, top_k, dtype=torch.int32)

    def run(self, activation: str = "silu", on_input: bool = False) -> torch.Tensor:
        return packed_moe(
            self.x,
            self.w13,
            self.w2,
            self.slot_of_expert,
            self.topk_weights,
            self.topk_ids,
            activation,
            on_input,
        )

    def expected(self, activation: str = "silu", on_input: bool = False) -> torch.Tensor:
        """Token by token, choice by choice, in float64."""
        activate = {
            "silu": functional.silu,
            "gelu": functional.gelu,
            "gelu_tanh": lambda gate: functional.gelu(gate, approximate="tanh"),
        }[activation]
        output = torch.zeros(self.x.shape, dtype=torch.float64)
        for token in range(self.x.shape[0]):
            for expert, weight in zip(
                self.topk_ids[token].tolist(), self.topk_weights[token].double().tolist(), strict=True
            ):
                code = -1 if expert < 0 else int(self.slot_of_expert[expert])
                if code < 0:
                    continue
                w13, w2 = (unpack(words[code // 2], code % 2).double() for words in (self.w13, self.w2))
                gate, up = w13[: len(w13) // 2], w13[len(w13) // 2 :]
                row = self.x[token].double() * (weight if on_input else 1.0)
                inner = activate(gate @ row) * (up @ row)
                output[token] += (w2 @ inner) * (1.0 if on_input else weight)
        return output

    def check(self, activation: str = "silu", on_input: bool = False) -> None:
        got, expected = self.run(activation, on_input), self.expected(activation, on_input)
        assert got.dtype == self.x.dtype
        assert got.shape == self.x.shape
        scale = expected.abs().max().item() if expected.numel() else 0.0
        assert torch.allclose(got.double(), expected, rtol=0, atol=TOLERANCE[self.x.dtype] * scale)


@settings(deadline=None, max_examples=60)
@given(
    num_tokens=st.integers(0, 20),
    num_experts=st.integers(1, 12),
    share=st.floats(0, 0.5),
    hidden_size=st.integers(1, 40),
    intermediate_size=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_random_shapes(
    num_tokens: int,
    num_experts: int,
    share: float,
    hidden_size: int,
    intermediate_size: int,
    seed: int,
    data: st.DataObject,
) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    pairs = int(share * num_experts)
    Case(num_tokens, num_experts, pairs, top_k, hidden_size, intermediate_size, torch.float32, seed).check()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("on_input", [False, True])
def test_dtypes_and_activations(dtype: torch.dtype, activation: str, on_input: bool) -> None:
    Case(num_tokens=9, dtype=dtype).check(activation, on_input)


def test_ids_of_minus_one_are_skipped() -> None:
    case = Case(num_tokens=6, dtype=torch.float32)
    case.topk_ids[0] = -1
    case.topk_ids[3, 1] = -1
    case.check()
    assert not case.run()[0].any()
    case.topk_ids[:] = -1
    assert not case.run().any()


def test_experts_of_other_ranks_are_skipped() -> None:
    case = Case(num_tokens=6, dtype=torch.float32)
    local = [0, 3]
    case.slot_of_expert = case.slots.slot_of_expert(local)
    case.w13, case.w2 = case.w13[local], case.w2[local]
    case.check()


def test_all_tokens_on_one_expert_and_none() -> None:
    case = Case(num_tokens=17, top_k=1, dtype=torch.float32)
    case.topk_ids[:] = 5
    case.check()
    assert Case(num_tokens=0).run().shape == (0, 32)


def test_slots_without_tokens_are_not_read() -> None:
    case = Case(num_tokens=4, dtype=torch.float32)
    expected = case.run()
    used = {int(code) // 2 for code in case.slot_of_expert[case.topk_ids.long()].flatten()}
    unused = [slot for slot in range(case.slots.num_slots) if slot not in used]
    assert unused
    # 0x7FFF would decode to numbers that no sum could hide.
    case.w13[unused], case.w2[unused] = 0x7FFF, 0x7FFF
    assert torch.equal(case.run(), expected)


def test_inputs_stay_as_they_are() -> None:
    case = Case()
    before = [case.x.clone(), case.topk_weights.clone(), case.topk_ids.clone()]
    case.run(on_input=True)
    assert all(torch.equal(a, b) for a, b in zip(before, [case.x, case.topk_weights, case.topk_ids], strict=True))


def test_it_is_a_well_formed_operator() -> None:
    case = Case(dtype=torch.float32)
    arguments = (case.x, case.w13, case.w2, case.slot_of_expert, case.topk_weights, case.topk_ids, "silu", False)
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
    case.w2 = case.w2[:, :, 1:]
    with pytest.raises(ValueError, match=r"w2 \[5, 32, 23\]"):
        case.run()
    case = Case()
    case.topk_weights = case.topk_weights[1:]
    with pytest.raises(ValueError, match=r"topk_weights \[4, 2\]"):
        case.run()
