"""Random calls of `coded_moe`; `cases.py` has what is compared and how."""

import torch

from tests.kernels.cases import Call
from vllm_puzzle.format import CODE_BITS, join_rows, pack_codes, zero_code
from vllm_puzzle.kernels import ENGINES, REFERENCE, CodedMatrices, coded_moe

STAYING = tuple(f"{matrix}_{name}" for matrix in ("w13", "w2") for name in ("codes", "index", "codebook", "scale"))


class Matrix:
    """The codes of one matrix of an expert: uint8 (rows, columns), of random points and scales."""

    def __init__(self, generator: torch.Generator, rows: int, columns: int, bits: int) -> None:
        self.bits = bits
        self.codes = torch.randint(1 << bits, (rows, columns), generator=generator).to(torch.uint8)
        self.codebook = torch.randn(1 << bits, 2, generator=generator).bfloat16()
        # Not the first, since zero bytes stand for that one.
        self.codebook[3] = 0
        self.scale = (torch.rand(2, rows, generator=generator) * 0.2 + 0.01).bfloat16()

    def weights(self) -> torch.Tensor:
        """float64 (2, rows, columns)."""
        return self.codebook.double()[self.codes.int()].permute(2, 0, 1) * self.scale.double()[:, :, None]

    def store(self, matrices: CodedMatrices, expert: int) -> None:
        """Copies this to where a checkpoint's tensors are copied to."""
        words = pack_codes(self.codes, self.bits, zero_code(self.codebook))
        matrices.packed(expert)[: words.shape[0], : words.shape[1]] = words
        matrices.codebook[expert, : 1 << self.bits] = self.codebook
        matrices.scale[expert, :, : self.scale.shape[1]] = self.scale


class CodedCase(Call):
    """A call of `coded_moe`; experts are in the order of their ids but one, and `widths` go round."""

    def __init__(
        self,
        num_tokens: int = 5,
        num_experts: int = 8,
        top_k: int = 2,
        hidden_size: int = 33,
        intermediate_size: int = 24,
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
        widths: tuple[int, ...] = CODE_BITS,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        super().__init__(generator, num_tokens, num_experts, top_k, hidden_size, intermediate_size, dtype)
        self.w13_bits = [widths[expert % len(widths)] for expert in range(num_experts)]
        self.w2_bits = self.w13_bits[1:] + self.w13_bits[:1]
        self.w13 = [Matrix(generator, intermediate_size, hidden_size, bits) for bits in self.w13_bits]
        self.w2 = [Matrix(generator, (hidden_size + 1) // 2, intermediate_size, bits) for bits in self.w2_bits]
        self.expert_map = torch.arange(num_experts).roll(1).int()

    @property
    def place_of_expert(self) -> torch.Tensor:
        return self.expert_map

    def matrices(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.w13[place].weights().flatten(0, 1), join_rows(self.w2[place].weights(), self.x.shape[1])

    def make_positive(self) -> None:
        """See `Case.make_positive`."""
        self.x = self.x.abs()
        for matrix in (*self.w13, *self.w2):
            matrix.codebook.abs_()

    def keep(self, places: list[int]) -> None:
        """Leaves the experts at `places` here, as a rank has them."""
        table = {place: index for index, place in enumerate(places)}
        self.expert_map = torch.tensor([table.get(place, -1) for place in self.expert_map.tolist()], dtype=torch.int32)
        self.w13, self.w2 = ([matrices[place] for place in places] for matrices in (self.w13, self.w2))
        self.w13_bits, self.w2_bits = ([matrix.bits for matrix in matrices] for matrices in (self.w13, self.w2))

    def weights(self, engine: str) -> tuple[CodedMatrices, CodedMatrices]:
        """w13 and w2 as `engine` takes them."""
        found = ENGINES[engine]
        sizes = (self.x.shape[1], self.intermediate_size)
        allocated = found.allocate_codes(self.w13_bits, self.w2_bits, *sizes)
        for matrices, experts in zip(allocated, (self.w13, self.w2), strict=True):
            for place, expert in enumerate(experts):
                expert.store(matrices, place)
        found.prepare_codes(*allocated, *self.topk_ids.shape)
        return allocated

    def tensors(self, engine: str) -> tuple[torch.Tensor, ...]:
        """The operator's, as `engine` takes them."""
        w13, w2 = self.weights(engine)
        return (self.x, *w13.tensors(), *w2.tensors(), self.expert_map, self.topk_weights, self.topk_ids)

    def named(self, engine: str) -> dict[str, torch.Tensor]:
        """`tensors` by the names of the operator's arguments."""
        names = ("x", *STAYING, "expert_map", "topk_weights", "topk_ids")
        return dict(zip(names, self.tensors(engine), strict=True))

    def run(self, activation: str = "silu", on_input: bool = False, engine: str = REFERENCE) -> torch.Tensor:
        return coded_moe(*self.tensors(engine), activation, on_input, engine)
