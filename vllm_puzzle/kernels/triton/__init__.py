"""The Triton engine; importing it does not import Triton."""

from .engine import TRITON, TRITON_ENGINE

__all__ = ["TRITON", "TRITON_ENGINE"]
