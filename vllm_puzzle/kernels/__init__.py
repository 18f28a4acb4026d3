"""The operator `packed_moe` and the engines behind it; importing it registers `torch.ops.vllm_puzzle.packed_moe`."""

from .operator import packed_moe
from .reference import ACTIVATIONS

__all__ = ["ACTIVATIONS", "packed_moe"]
