"""Random calls of the operator, and what they must give: a float64 computation that shares no code with it."""

from collections.abc import Callable

import torch
from torch.nn import functional

from vllm_puzzle.format import WORD16, LayerSlots, pack, unpack
from vllm_puzzle.kernels import ENGINES, REFERENCE, TRITON, packed_moe
from vllm_puzzle.kernels.triton.target import INTERPRETED

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
# Triton's interpreter cuts bfloat16 off where a GPU rounds it, in each of three places.
INTERPRETED_TOLERANCE = {**TOLERANCE, torch.bfloat16: 2e-2}
# Where kernels are compiled, they run on a GPU.
TRITON_DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


def random_words(generator: torch.Generator, *shape: int) -> torch.Tensor:
    magnitude = torch.rand(shape, generator=generator) * 0.2
    masks = [torch.rand(shape, generator=generator) < 0.75 for _ in range(2)]
    signs = [torch.rand(shape, generator=generator) < 0.5 for _ in range(2)]
    return pack(magnitude, masks, signs)


class Call:
    """Random tokens and routing, and what experts must make of them."""

    def __init__(
        self,
        generator: torch.Generator,
        num_tokens: int,
        num_experts: int,
        top_k: int,
        hidden_size: int,
        intermediate_size: int,
        dtype: torch.dtype,
    ) -> None:
        self.intermediate_size = intermediate_size
        self.x = torch.randn(num_tokens, hidden_size, generator=generator).to(dtype)
        self.topk_weights = torch.rand(num_tokens, top_k, generator=generator)
        chosen = [torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(num_tokens)]
        self.topk_ids = torch.stack(chosen).int() if chosen else torch.empty(0, top_k, dtype=torch.int32)

    @property
    def place_of_expert(self) -> torch.Tensor:
        """(num_global_experts,), int32: where each expert is, -1 for one that is not here; to be written to."""
        raise NotImplementedError

    def matrices(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The w13 and w2 of the expert at a place, float64."""
        raise NotImplementedError

    def run(self, activation: str = "silu", on_input: bool = False, engine: str = REFERENCE) -> torch.Tensor:
        raise NotImplementedError

    def expected(self, activation: str = "silu", on_input: bool = False) -> torch.Tensor:
        """Expert by expert, in float64."""
        activate = {
            "silu": functional.silu,
            "gelu": functional.gelu,
            "gelu_tanh": lambda gate: functional.gelu(gate, approximate="tanh"),
        }[activation]
        output = torch.zeros(self.x.shape, dtype=torch.float64)
        for expert, place in enumerate(self.place_of_expert.tolist()):
            tokens, choices = torch.where(self.topk_ids == expert)
            if place < 0 or not len(tokens):
                continue
            w13, w2 = self.matrices(place)
            weight = self.topk_weights[tokens, choices, None].double()
            gate, up = ((self.x[tokens].double() * (weight if on_input else 1.0)) @ w13.T).chunk(2, dim=1)
            result = (activate(gate) * up) @ w2.T
            output.index_add_(0, tokens, result if on_input else result * weight)
        return output

    def check(self, activation: str = "silu", on_input: bool = False, engine: str = REFERENCE) -> None:
        interpreted = engine == TRITON and INTERPRETED
        tolerance = (INTERPRETED_TOLERANCE if interpreted else TOLERANCE)[self.x.dtype]
        self.compare(self.run(activation, on_input, engine), self.expected(activation, on_input), tolerance)

    def compare(self, got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
        assert got.dtype == self.x.dtype
        assert got.shape == self.x.shape
        assert torch.isfinite(got).all()
        error = (got.double() - expected).norm()
        allowed = tolerance * expected.norm() + absolute_error(got.dtype) * got.numel() ** 0.5
        assert error <= allowed, f"relative error {error / expected.norm()}"


class Case(Call):
    """A call of `packed_moe`, with random packed experts."""

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
        super().__init__(generator, num_tokens, num_experts, top_k, hidden_size, intermediate_size, dtype)

    @property
    def place_of_expert(self) -> torch.Tensor:
        return self.slot_of_expert

    def matrices(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        slot, member = divmod(place, 2)
        return unpack(self.w13[slot], member).double(), unpack(self.w2[slot], member).double()

    def make_positive(self) -> None:
        """Leaves no two terms to cancel: in a sum of few, rounding can be all that is left, and says nothing."""
        self.x = self.x.abs()
        for words in (self.w13, self.w2):
            words &= ~sum(1 << bit for bit in WORD16.sign_bits)

    def weights(self, engine: str) -> tuple[torch.Tensor, torch.Tensor]:
        """w13 and w2 as `engine` takes them."""
        found = ENGINES[engine]
        hidden_size, intermediate_size = self.x.shape[1], self.intermediate_size
        w13, w2 = found.allocate(len(self.w13), hidden_size, intermediate_size)
        for half, words in zip(w13.chunk(2, dim=1), self.w13.chunk(2, dim=1), strict=True):
            half[:, :intermediate_size, :hidden_size] = words
        w2[:, :hidden_size, :intermediate_size] = self.w2
        found.prepare(w13, w2, *self.topk_ids.shape)
        return w13, w2

    def tensors(self, engine: str) -> tuple[torch.Tensor, ...]:
        """The operator's, as `engine` takes them and where it computes."""
        device = TRITON_DEVICE if engine == TRITON else self.x.device
        tensors = (self.x, *self.weights(engine), self.slot_of_expert, self.topk_weights, self.topk_ids)
        return tuple(tensor.to(device) for tensor in tensors)

    def run(self, activation: str = "silu", on_input: bool = False, engine: str = REFERENCE) -> torch.Tensor:
        return packed_moe(*self.tensors(engine), activation, on_input, engine).to(self.x.device)


def absolute_error(dtype: torch.dtype) -> float:
    """What an element may be off however small it is.

    Below the smallest normal number (2^-14 of float16, which outputs of the smallest cases reach) numbers lie a fixed
    spacing apart, so rounding is no longer relative. Rounding the output costs half of it; rounding the inner
    activations as much, times weights of at most 0.2. That is under one spacing, and what is compared may have been
    rounded so on both sides.
    """
    info = torch.finfo(dtype)
    return 2 * info.smallest_normal * info.eps


def check_what_is_not_finite(case: Call, run: Callable[[], torch.Tensor]) -> None:
    """Puts NaN and infinities where a call must not look, and then where they may spoil one row each.

    Args:
        case: of 8 tokens at least, finite.
        run: computes `case` as it then is.
    """
    skipped, elsewhere, infinite, nan, weighted = range(3, 8)
    clean = range(3)
    # Expert 0 becomes another rank's: one token has no other expert.
    case.place_of_expert[0] = -1
    case.topk_ids[:] = case.topk_ids.clamp(min=1)
    case.topk_ids[skipped] = -1
    case.topk_ids[elsewhere] = 0
    case.topk_ids[0, 0], case.topk_ids[1, -1] = -1, 0
    expected = run()
    assert not expected[[skipped, elsewhere]].any()

    case.x[[skipped, elsewhere]] = torch.tensor([[torch.nan], [torch.inf]]).to(case.x.dtype)
    case.topk_weights[[skipped, elsewhere]] = torch.tensor([[torch.inf], [torch.nan]])
    case.topk_weights[0, 0], case.topk_weights[1, -1] = torch.nan, -torch.inf
    assert torch.equal(run(), expected)

    case.x[infinite, 5], case.x[nan, 5] = torch.inf, torch.nan
    case.topk_weights[weighted] = torch.nan
    got = run()
    assert not got[[infinite, nan, weighted]].isfinite().any()
    kept = [*clean, skipped, elsewhere, *range(8, len(got))]
    assert torch.equal(got[kept], expected[kept])


def check_ids_of_minus_one(case: Call, engine: str) -> None:
    """Choices of -1 are skipped; `case` has 4 tokens or more of 2 choices."""
    case.topk_ids[0] = -1
    case.topk_ids[3, 1] = -1
    case.check(engine=engine)
    assert not case.run(engine=engine)[0].any()
    case.topk_ids[:] = -1
    assert not case.run(engine=engine).any()


def check_ids_and_weights_of_other_types(case: Call, engine: str) -> None:
    """int64 ids and float64 weights give the same bits."""
    expected = case.run(engine=engine)
    case.topk_ids = case.topk_ids.long()
    case.topk_weights = case.topk_weights.double()
    assert torch.equal(case.run(engine=engine), expected)
