"""Our engine on packed pairs and on coded experts."""

import torch

from benchmarks.cpu_moe.engine import Engine
from vllm_puzzle.kernels import CodedMatrices, choose_engine, coded_moe, packed_moe
from vllm_puzzle.kernels.cpu import empty_slots, tile_slots_
from vllm_puzzle.tuning.shape import LayerShape

CPU = torch.device("cpu")


class Packed(Engine):
    """Experts 2 s and 2 s + 1 are slot s; a slot is read once, whichever of its members have tokens."""

    bytes_per_weight = 2

    def __init__(self, w13: torch.Tensor, w2: torch.Tensor) -> None:
        self.name = choose_engine(CPU, torch.bfloat16).name
        self._w13, self._w2 = w13, w2
        self._slot_of_expert = torch.arange(2 * w13.shape[0], dtype=torch.int32)

    @classmethod
    def from_words(cls, w13: torch.Tensor, w2: torch.Tensor) -> "Packed":
        """From slots in row-major order, as a checkpoint has them."""
        layer = cls(*(empty_slots(*words.shape).copy_(words) for words in (w13, w2)))
        tile_slots_(layer._w13, layer._w2)
        return layer

    def run(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        return packed_moe(
            x, self._w13, self._w2, self._slot_of_expert, topk_weights, topk_ids, "silu", engine=self.name
        )

    def copy(self) -> "Packed":
        return Packed(*(empty_slots(*words.shape).copy_(words) for words in (self._w13, self._w2)))


class Coded(Engine):
    """Experts of random codes: what they decode to costs no time, so no peer needs to have the same."""

    def __init__(self, w13: CodedMatrices, w2: CodedMatrices, bits: int) -> None:
        self._engine = choose_engine(CPU, torch.bfloat16, codes=True)
        self.name = f"coded_{bits / 2:g}"
        self.bytes_per_weight = bits / 16
        self._bits, self._w13, self._w2 = bits, w13, w2
        self._expert_map = torch.arange(len(w13.index), dtype=torch.int32)

    @classmethod
    def random(cls, shape: LayerShape, bits: int, max_num_tokens: int) -> "Coded":
        """All of a layer's experts at `bits` bits a code."""
        engine = choose_engine(CPU, torch.bfloat16, codes=True)
        widths = [bits] * shape.num_experts
        w13, w2 = engine.allocate_codes(widths, widths, shape.hidden_size, shape.intermediate_size)
        for matrices in (w13, w2):
            torch.randint(0, 256, matrices.codes.shape, out=matrices.codes)
            matrices.codebook[:, : 1 << bits] = torch.randn(shape.num_experts, 1 << bits, 2)
            matrices.codebook[:, 0] = 0
            matrices.scale.uniform_(0.01, 0.03)
        engine.prepare_codes(w13, w2, max_num_tokens, shape.top_k)
        return cls(w13, w2, bits)

    def run(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        weights = (*self._w13.tensors(), *self._w2.tensors())
        return coded_moe(x, *weights, self._expert_map, topk_weights, topk_ids, "silu", engine=self._engine.name)

    def copy(self) -> "Coded":
        engine, experts = self._engine, len(self._w13.index)
        hidden_size, intermediate_size = 2 * self._w2.scale.shape[2], self._w13.scale.shape[2]
        widths = [self._bits] * experts
        copies = engine.allocate_codes(widths, widths, hidden_size, intermediate_size)
        for matrices, mine in zip(copies, (self._w13, self._w2), strict=True):
            for tensor, source in zip(matrices.tensors(), mine.tensors(), strict=True):
                tensor.copy_(source)
        return Coded(*copies, self._bits)
