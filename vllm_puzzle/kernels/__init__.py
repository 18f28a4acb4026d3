"""The operator `packed_moe` and the engines behind it; importing it registers `torch.ops.vllm_puzzle.packed_moe`.

Importing it imports neither Triton nor compiled code; an engine does when it is first chosen or run.
"""

from .choice import choose_engine
from .engine import Arguments, Engine, padded
from .errors import EngineError
from .operator import packed_moe
from .reference import REFERENCE
from .registry import ENGINES
from .triton import TRITON

__all__ = [
    "ENGINES",
    "REFERENCE",
    "TRITON",
    "Arguments",
    "Engine",
    "EngineError",
    "choose_engine",
    "packed_moe",
    "padded",
]
