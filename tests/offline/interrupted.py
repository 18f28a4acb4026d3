"""Conversions that are interrupted while they write."""

from pathlib import Path

import pytest
import torch

from vllm_puzzle.offline.checkpoints.shards import ShardWriter


def with_text(options: list[str], text: Path) -> list[str]:
    """Options with a file in the place of TEXT."""
    return [str(text) if option == "TEXT" else option for option in options]


class BreakAt:
    """Lets tensors be written until the one of that number."""

    def __init__(self, number: int | None) -> None:
        self.number = number
        self.writes = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        write = ShardWriter.write

        def break_off(writer: ShardWriter, name: str, tensor: torch.Tensor) -> None:
            self.writes += 1
            if self.writes == self.number:
                raise KeyboardInterrupt
            write(writer, name, tensor)

        monkeypatch.setattr(ShardWriter, "write", break_off)
