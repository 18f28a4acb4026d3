"""`python -m vllm_puzzle.inspect`: see `vllm_puzzle.cli`."""

import sys

from vllm_puzzle.cli import main_of

if __name__ == "__main__":
    sys.exit(main_of("inspect"))
