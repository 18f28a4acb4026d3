"""The loaders of coded experts: which part goes where on a rank, and what is counted."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.model_executor.model_loader.reload.meta import CopyCounter

from tests.coded import CodedExpert
from vllm_puzzle.format import (
    CODE_BITS,
    CODES_PER_GROUP,
    FormatError,
    LayerCodes,
    decode,
    join_rows,
    pack_codes,
    unpack_codes,
)
from vllm_puzzle.kernels import ENGINES, REFERENCE
from vllm_puzzle.kernels.coded import allocate_matrices
from vllm_puzzle.kernels.engine import padded_codes
from vllm_puzzle.plugin.coded_loader import CodebookLoader, CodedPart, CodesLoader, ScaleLoader, cut_columns
from vllm_puzzle.plugin.loader import Projection, Rank

# No multiples of what is read at once, and parts of ranks begin within a group of codes.
HIDDEN_SIZE, INTERMEDIATE_SIZE = 71, 88
CODES = LayerCodes(layer=0, w13_bits=[4, 8, 6], w2_bits=[6, 5, 8])
PREFIX = "model.layers.0.mlp.experts"
# The order in which an expert's tensors are stored, as shards and as the loaders of their kinds.
TENSORS = (("w1", 0), ("w1", 1), ("w1", 2), ("w3", 2), ("w2", 0), ("w2", 1), ("w2", 2))

ALONE = Rank()


class Loaded:
    """A rank's parameters, filled with rubbish as a reload's are, and their loaders."""

    def __init__(self, position: dict[int, int], rank: Rank = ALONE, multiple: int = 1) -> None:
        projections = {
            "w1": Projection("gate_proj", (INTERMEDIATE_SIZE, HIDDEN_SIZE)),
            "w3": Projection("up_proj", (INTERMEDIATE_SIZE, HIDDEN_SIZE)),
            "w2": Projection("down_proj", (HIDDEN_SIZE, INTERMEDIATE_SIZE)),
        }
        part = CodedPart(PREFIX, CODES, position, projections, HIDDEN_SIZE, INTERMEDIATE_SIZE, rank)
        hidden, intermediate = padded_codes(HIDDEN_SIZE, INTERMEDIATE_SIZE // rank.count, multiple)
        self.w13 = allocate_matrices(part.widths("w1"), intermediate, hidden, ENGINES[REFERENCE].zero_bytes)
        self.w2 = allocate_matrices(part.widths("w2"), hidden // 2, intermediate, ENGINES[REFERENCE].zero_bytes)
        for matrices in (self.w13, self.w2):
            matrices.codes.fill_(0xA5)
            matrices.codebook.fill_(torch.nan)
            matrices.scale.fill_(torch.nan)
        self.loaders = [CodesLoader(part, self.w13, self.w2), CodebookLoader(part), ScaleLoader(part)]

    def load(self, expert: int, tensors: list[torch.Tensor], device: str = "cpu") -> list[bool]:
        """What the loaders said to each of an expert's tensors, with parameters on `device`."""
        said = []
        for (shard, kind), tensor in zip(TENSORS, tensors, strict=True):
            matrices = self.w2 if shard == "w2" else self.w13
            data = (matrices.codes, matrices.codebook, matrices.scale)[kind]
            if device == "meta":
                data = torch.empty_like(data, device=device)
            parameter = torch.nn.Parameter(data, requires_grad=False)
            said.append(self.loaders[kind](parameter, tensor, "name", shard, expert, True))
        return said

    def decoded(self, place: int) -> list[torch.Tensor]:
        """Gate, up and down as they lie in the parameters, padding included."""
        weights = []
        for matrices in (self.w13, self.w2):
            bits, words = int(matrices.index[place, 1]), matrices.packed(place)
            codes = unpack_codes(words, bits, words.shape[1] // bits * CODES_PER_GROUP)
            weights.append(decode(codes, matrices.codebook[place], matrices.scale[place]))
        return [*weights[0], join_rows(weights[1], 2 * weights[1].shape[1])]

    def finish(self) -> None:
        for loader in self.loaders:
            loader.finish()


@pytest.fixture(scope="module")
def experts() -> list[CodedExpert]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((INTERMEDIATE_SIZE, HIDDEN_SIZE), (INTERMEDIATE_SIZE, HIDDEN_SIZE), (HIDDEN_SIZE, INTERMEDIATE_SIZE))
    return [
        CodedExpert.of(*(torch.randn(shape, generator=generator) for shape in shapes), *bits)
        for bits in zip(CODES.w13_bits, CODES.w2_bits, strict=True)
    ]


@pytest.mark.parametrize("multiple", [1, 32])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_tensor_parallel_ranks_load_their_own_rows_and_columns(
    num_ranks: int, multiple: int, experts: list[CodedExpert]
) -> None:
    """Padding has scales of zero, whatever was there, and the codebooks that a rank holds have nothing past theirs."""
    share = INTERMEDIATE_SIZE // num_ranks
    for index in range(num_ranks):
        loaded = Loaded({0: 0, 1: 1, 2: 2}, Rank(index, num_ranks), multiple)
        mine = slice(index * share, (index + 1) * share)
        for place, expert in enumerate(experts):
            assert loaded.load(place, expert.tensors()) == [True] * len(TENSORS)
            gate, up, down = (matrix.float() for matrix in expert.matrices())
            here = loaded.decoded(place)
            for found, expected in zip(here[:2], (gate[mine], up[mine]), strict=True):
                assert torch.equal(found[:share, :HIDDEN_SIZE], expected)
                assert not found[share:].any()
            assert torch.equal(here[2][:HIDDEN_SIZE, :share], down[:, mine])
            assert not here[2][HIDDEN_SIZE:].any()
            for matrices, bits in ((loaded.w13, CODES.w13_bits[place]), (loaded.w2, CODES.w2_bits[place])):
                assert not matrices.codebook[place, 1 << bits :].any()
        loaded.finish()


def test_an_expert_parallel_rank_may_hold_any_experts(experts: list[CodedExpert]) -> None:
    loaded = Loaded({2: 0, 0: 1})
    for expert, coded in enumerate(experts):
        assert loaded.load(expert, coded.tensors()) == [expert != 1] * len(TENSORS)
    loaded.finish()
    for expert, place in ((2, 0), (0, 1)):
        for found, expected in zip(loaded.decoded(place), experts[expert].matrices(), strict=True):
            assert torch.equal(found[: expected.shape[0], : expected.shape[1]], expected.float())


def test_a_replica_is_loaded_from_the_expert_that_it_copies(experts: list[CodedExpert]) -> None:
    """Expert-parallel load balancing counts on from the model's experts."""
    loaded = Loaded({1: 0, 4: 1})
    assert all(loaded.load(1, experts[1].tensors()))
    with pytest.raises(
        FormatError, match=r"2 of 4 packed .*: \S*experts\.1\.gate_proj\.weight_packed, \S*experts\.1\.down"
    ):
        loaded.finish()
    assert all(loaded.load(4, experts[1].tensors()))
    assert torch.equal(loaded.decoded(0)[0], loaded.decoded(1)[0])


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_reload_is_told_how_much_comes(num_ranks: int, experts: list[CodedExpert]) -> None:
    """vLLM counts what is copied into parameters on the meta device, to know when a layer is whole."""
    loaded = Loaded({0: 0, 2: 1}, Rank(num_ranks - 1, num_ranks), multiple=32)
    tensors = {expert: experts[expert].tensors() for expert in (0, 2)}
    with CopyCounter() as counter:
        for expert in (0, 2, 0, 2):
            loaded.load(expert, tensors[expert], "meta")
    assert counter.copied_numel == 2 * sum(loader.num_loaded(("w1", "w3", "w2")) for loader in loaded.loaders)


def test_what_is_missing_comes_twice_or_does_not_belong_is_named(experts: list[CodedExpert]) -> None:
    loaded, tensors = Loaded({0: 0}), experts[0].tensors()
    codes, codebooks, scales = loaded.loaders
    loaded.load(0, tensors)
    parameter = torch.nn.Parameter(loaded.w13.codes, requires_grad=False)
    with pytest.raises(FormatError, match=r"experts\.0\.gate_proj\.weight_packed is in the checkpoint more than once"):
        codes(parameter, tensors[0], "name", "w1", 0)
    with pytest.raises(FormatError, match=r"0\.up_proj\.weight_codebook is unexpected: gate and up share the one"):
        codebooks(parameter, tensors[1], "name", "w3", 0)
    with pytest.raises(FormatError, match=r"weight_scale is unexpected: this layer has experts 0 to 2"):
        scales(parameter, tensors[2], "name", "w1", 3)
    loaded.finish()
    message = r"3 of 3 packed tensors of model\.layers\.0\.mlp\.experts .*: \S*gate_proj\.weight_scale, \S*up_proj"
    with pytest.raises(FormatError, match=message):
        scales.finish()


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (0, torch.zeros(88, 12, dtype=torch.int64), r"torch.int64 \[88, 12\], this model needs torch.int32 \[88, 12\]"),
        (0, torch.zeros(88, 15, dtype=torch.int32), r"\[88, 15\], this model needs torch.int32 \[88, 12\]"),
        (1, torch.zeros(32, 2, dtype=torch.bfloat16), r"\[32, 2\], this model needs torch.bfloat16 \[16, 2\]"),
        (2, torch.zeros(88, dtype=torch.float32), r"torch.float32 \[88\], this model needs torch.bfloat16 \[88\]"),
    ],
)
def test_a_tensor_of_another_shape_or_type(kind: int, wrong: torch.Tensor, message: str) -> None:
    loaded = Loaded({0: 0})
    parameter = torch.nn.Parameter(loaded.w13.codes, requires_grad=False)
    with pytest.raises(FormatError, match=message):
        loaded.loaders[kind](parameter, wrong, "name", "w1", 0)


@given(bits=st.sampled_from(CODE_BITS), first=st.integers(0, 100), count=st.integers(1, 100), after=st.integers(0, 70))
def test_columns_are_cut_wherever_a_rank_begins(bits: int, first: int, count: int, after: int) -> None:
    generator = torch.Generator().manual_seed(first)
    codes = torch.randint(1 << bits, (2, first + count + after), generator=generator).to(torch.uint8)
    cut = cut_columns(pack_codes(codes, bits, zero=1), bits, slice(first, first + count))
    assert torch.equal(unpack_codes(cut, bits, count), codes[:, first : first + count])
