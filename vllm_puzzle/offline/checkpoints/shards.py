"""Safetensors files written one tensor at a time, so that no more than one tensor has to be in memory.

The format (github.com/huggingface/safetensors) puts all names and places first. Here they are known before any tensor
is: a packed matrix has the size of its experts'. The library's own writer wants all tensors of a file at once.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch

from .checkpoint import TensorInfo
from .manifest import ShardEntry

# As safetensors aligns the first tensor.
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorLayout:
    """A tensor that will be written; `dtype` in safetensors' own spelling, e.g. `BF16`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def element_bytes(self) -> int:
        return self.num_bytes // max(1, math.prod(self.shape))

    @classmethod
    def copy_of(cls, name: str, info: TensorInfo) -> "TensorLayout":
        return cls(name, info.dtype, info.shape, info.plain_bytes)


@dataclass(frozen=True)
class ShardLayout:
    """One file, and its tensors in the order in which they will be written."""

    file: str
    tensors: tuple[TensorLayout, ...]


def lay_out_shards(groups: Sequence[Sequence[TensorLayout]], shard_size: int) -> list[list[ShardLayout]]:
    """The files of every group, none larger than `shard_size` bytes of tensors unless it holds only one.

    No file holds tensors of two groups, so each group can be written alone and again.
    """
    parts = [list(_split(group, shard_size)) for group in groups]
    total = sum(len(files) for files in parts)
    number = 0
    layouts: list[list[ShardLayout]] = []
    for files in parts:
        layouts.append([])
        for tensors in files:
            number += 1
            layouts[-1].append(ShardLayout(f"model-{number:05}-of-{total:05}.safetensors", tuple(tensors)))
    return layouts


def _split(tensors: Sequence[TensorLayout], shard_size: int) -> Iterator[list[TensorLayout]]:
    part: list[TensorLayout] = []
    for tensor in tensors:
        if part and sum(each.num_bytes for each in part) + tensor.num_bytes > shard_size:
            yield part
            part = []
        part.append(tensor)
    yield part


class ShardWriter:
    """Writes the tensors of `shards`, in their order, into `directory`; `entries` has the files that are whole.

    Raises:
        OSError: the disk is full, or cannot be written.
    """

    def __init__(self, directory: Path, shards: Sequence[ShardLayout]) -> None:
        self.entries: list[ShardEntry] = []
        self._directory = directory
        self._shards = list(shards)
        self._expected: list[TensorLayout] = []
        self._file: BinaryIO | None = None
        self._hash = hashlib.sha256()
        self._size = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if kind is None:
            assert not self._shards
            assert not self._expected

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """The next tensor; its bytes are written as they are."""
        if self._file is None:
            self._begin()
        layout = self._expected.pop(0)
        # Not the shape: two elements of four bits are one of torch's.
        assert (name, tensor.nbytes) == (layout.name, layout.num_bytes)
        self._put(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        if not self._expected:
            self._end()

    def _begin(self) -> None:
        shard = self._shards[0]
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in shard.tensors:
            end = offset + tensor.num_bytes
            header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._expected = list(shard.tensors)
        self._hash, self._size = hashlib.sha256(), 0
        self._file = open(self._directory / shard.file, "wb")  # noqa: SIM115
        self._put(len(text).to_bytes(8, "little") + text)

    def _put(self, content: "bytes | memoryview") -> None:
        assert self._file is not None
        self._file.write(content)
        self._hash.update(content)
        self._size += len(content)

    def _end(self) -> None:
        assert self._file is not None
        self._file.close()
        self._file = None
        shard = self._shards.pop(0)
        self.entries.append(ShardEntry(file=shard.file, num_bytes=self._size, sha256=self._hash.hexdigest()))
