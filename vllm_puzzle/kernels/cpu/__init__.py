"""The CPU engine; importing it loads no compiled code."""

from .engine import CPU_ENGINES, CpuEngine
from .levels import choose_isa, unusable, usable_isas
from .library import Isa
from .slots import empty_slots, order_codes_, tile_slots_
from .workspace import WORKSPACE

__all__ = [
    "CPU_ENGINES",
    "WORKSPACE",
    "CpuEngine",
    "Isa",
    "choose_isa",
    "empty_slots",
    "order_codes_",
    "tile_slots_",
    "unusable",
    "usable_isas",
]
