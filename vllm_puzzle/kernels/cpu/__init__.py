"""The CPU engine; importing it loads no compiled code."""

from .engine import cpu_moe, empty_slots, fits_cpu, has_memory, padded, reserve_workspace, tile_slots_
from .library import Isa, unusable, usable_isas

__all__ = [
    "Isa",
    "cpu_moe",
    "empty_slots",
    "fits_cpu",
    "has_memory",
    "padded",
    "reserve_workspace",
    "tile_slots_",
    "unusable",
    "usable_isas",
]
