"""The command line: `vllm-puzzle COMMAND` and `python -m vllm_puzzle.COMMAND`."""

from .command_line import main, main_of

__all__ = ["main", "main_of"]
