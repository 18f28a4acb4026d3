"""The operators `packed_moe` and `coded_moe` and the engines behind them; importing it registers both with torch.

Importing it imports neither Triton nor compiled code; an engine does when it is first chosen or run.
"""

from .choice import choose_engine
from .coded import CodedMatrices
from .engine import Arguments, CodedArguments, Engine, padded
from .errors import EngineError
from .operator import coded_moe, packed_moe
from .reference import REFERENCE
from .registry import ENGINES
from .triton import TRITON

__all__ = [
    "ENGINES",
    "REFERENCE",
    "TRITON",
    "Arguments",
    "CodedArguments",
    "CodedMatrices",
    "Engine",
    "EngineError",
    "choose_engine",
    "coded_moe",
    "packed_moe",
    "padded",
]
