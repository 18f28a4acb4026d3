"""The operator `packed_moe` and the engines behind it; importing it registers `torch.ops.vllm_puzzle.packed_moe`."""

from .choice import ENGINES, REFERENCE, TRITON, choose_engine, cpu_isa
from .errors import EngineError
from .operator import packed_moe
from .reference import ACTIVATIONS

__all__ = ["ACTIVATIONS", "ENGINES", "REFERENCE", "TRITON", "EngineError", "choose_engine", "cpu_isa", "packed_moe"]
