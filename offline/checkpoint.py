"""Reading a safetensors checkpoint: its config, its headers, and tensors one at a time."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig

from .errors import CheckpointError
from .model_config import read_config, read_json, read_raw_config
from .other_files import find_other_files

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

FLOATING_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class TensorInfo:
    """What a shard's header says of a tensor; `dtype` in safetensors' own spelling, e.g. `BF16`.

    `num_bytes` is what it takes on disk, `plain_bytes` what it takes once it is read.
    """

    shard: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def plain_bytes(self) -> int:
        return _num_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Stored:
    """A tensor of a shard, or the part of it that `index` picks."""

    shard: str
    name: str
    index: tuple[int | slice, ...] = ()


class Checkpoint:
    """A checkpoint directory whose every header has been read and held against its index.

    Raises:
        CheckpointError: no directory, no config.json, no safetensors, a shard that is missing, truncated or escapes
            the directory, or a tensor that the index and the shards disagree about.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a directory; give the folder that holds config.json and safetensors")
        self.raw_config: dict[str, Any] = read_raw_config(path)
        self.tensors: dict[str, TensorInfo] = {}
        weight_map = self._read_weight_map()
        for shard in sorted(set(weight_map.values())):
            self._read_header(shard, {name for name, where in weight_map.items() if where == shard})

    @property
    def config(self) -> PretrainedConfig:
        """See `read_config`."""
        return read_config(self.path)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def plain_bytes(self) -> int:
        return sum(tensor.plain_bytes for tensor in self.tensors.values())

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The named tensors, mapped from their shards; raises CheckpointError where one cannot be read."""
        return self.read_stored({name: Stored(self.tensors[name].shard, name) for name in names})

    def read_stored(self, parts: Mapping[str, Stored]) -> dict[str, torch.Tensor]:
        """Whatever the shards hold, under names of the caller's; raises CheckpointError where it cannot be read."""
        tensors = {}
        for shard in sorted({part.shard for part in parts.values()}):
            with _open(self.path / shard) as file:
                for name, part in parts.items():
                    if part.shard != shard:
                        continue
                    try:
                        whole = file.get_slice(part.name) if part.index else None
                        tensors[name] = file.get_tensor(part.name) if whole is None else whole[part.index]
                    except (SafetensorError, OSError) as error:
                        raise CheckpointError(f"{self.path / shard}: {part.name} cannot be read ({error})") from None
        return {name: tensors[name] for name in parts}

    def other_files(self) -> list[Path]:
        """The files that travel along unchanged, by their paths below this folder: see `find_other_files`."""
        return find_other_files(self.path)

    def _read_weight_map(self) -> dict[str, str]:
        index = self.path / INDEX_FILE
        if index.is_file():
            return read_weight_map(index)
        single = self.path / SINGLE_FILE
        if not single.is_file():
            raise CheckpointError(
                f"{self.path} holds neither {INDEX_FILE} nor {SINGLE_FILE}; only safetensors checkpoints are read"
            )
        with _open(single) as file:
            return dict.fromkeys(file.keys(), SINGLE_FILE)

    def _read_header(self, shard: str, expected: set[str]) -> None:
        path = self.path / shard
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing, {len(expected)} tensors of {INDEX_FILE} are in it; download the checkpoint again"
            )
        with _open(path) as file:
            present = set(file.keys())
            if present != expected:
                name = min(present ^ expected)
                where = "not in the file" if name in expected else f"not in {INDEX_FILE}"
                raise CheckpointError(f"{path}: tensor {name} is {where}; download the checkpoint again")
            for name in present:
                view = file.get_slice(name)
                shape = tuple(view.get_shape())
                dtype = view.get_dtype()
                self.tensors[name] = TensorInfo(shard, dtype, shape, _num_bytes(dtype, shape))


class SourceHash:
    """A hash of tensors by name, dtype, shape and content, whatever order and shards they are read in."""

    def __init__(self, lines: Iterable[str] = ()) -> None:
        self.lines = list(lines)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        content = hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()
        self.lines.append(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {content}\n")

    def hexdigest(self) -> str:
        return hashlib.sha256("".join(sorted(self.lines)).encode()).hexdigest()


def read_weight_map(index: Path) -> dict[str, str]:
    """Which shard holds each tensor; raises CheckpointError where the index does not say so, or names other folders."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index} has no usable `weight_map`; download the checkpoint again")
    for shard in set(weight_map.values()):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} names a shard outside its own directory: {shard!r}")
    return weight_map


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); download the checkpoint again"
        ) from None


def _num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    bits = {
        "F64": 64,
        "I64": 64,
        "U64": 64,
        "F32": 32,
        "I32": 32,
        "U32": 32,
        "BF16": 16,
        "F16": 16,
        "I16": 16,
        "U16": 16,
    }
    count = 1
    for size in shape:
        count *= size
    return count * bits.get(dtype, 8) // 8
