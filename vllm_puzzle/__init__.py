"""PuzzleMoE for vLLM: expert pairs packed into one 16-bit word per element.

Importing this package imports neither vLLM nor Triton nor compiled code.
"""

__version__ = "0.1.0"
