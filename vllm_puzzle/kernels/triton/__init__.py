"""The Triton engine; importing it imports Triton."""

from .engine import DTYPES, find_undecodable_slot, fits_triton, triton_moe
from .target import INTERPRETED, current_target

__all__ = ["DTYPES", "INTERPRETED", "current_target", "find_undecodable_slot", "fits_triton", "triton_moe"]
