"""Reading a safetensors checkpoint: its config, its headers, and tensors one at a time."""

import hashlib
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig

from vllm_puzzle.format import INDEX_FILE, FormatError, is_packed, parse_weight_map

from ..errors import CheckpointError
from .model_config import read_config, read_raw_config
from .other_files import find_other_files

SINGLE_FILE = "model.safetensors"

FLOATING_DTYPES = ("BF16", "F16", "F32")

# Every dtype of safetensors that torch has too, in bits; copied as it is. F4 comes in pairs along the last dimension.
_BITS = {
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8"), 8),
    **dict.fromkeys(("F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    "F4": 4,
}

# The weights of some models once more, in the layout and with the names of those who trained them.
_CONSOLIDATED = "consolidated"
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


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
    """A checkpoint directory whose every header has been read and compared with its index.

    Raises:
        CheckpointError: no directory, no config.json, no safetensors, a shard that is missing, truncated or escapes
            the directory, a tensor that the index and the shards disagree about, or one of a dtype that torch lacks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Not Path.is_dir, which raises where the name is too long.
        if not os.path.isdir(path):
            mend = "give the folder that holds config.json and safetensors"
            if HUB_ID.fullmatch(str(path)) and not os.path.lexists(path):
                mend += f"; a model on the hub is fetched by `hf download {path} --local-dir FOLDER`"
            raise CheckpointError(f"{path} is not a directory; {mend}")
        check_utf8(path)
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
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

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
            with self._open(shard) as file:
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

    @property
    def remedy(self) -> str:
        """What to advise where files are damaged."""
        if is_packed(self.raw_config):
            return "copy the packed checkpoint or convert its source again"
        return "copy or download the checkpoint again"

    def _read_weight_map(self) -> dict[str, str]:
        """Which shard holds each tensor: by the index, or as vLLM has it, all shards where there is none."""
        index = self.path / INDEX_FILE
        if index.is_file():
            return read_weight_map(index, self.remedy)
        weight_map: dict[str, str] = {}
        for shard in self._find_shards():
            with self._open(shard) as file:
                for name in sorted(file.keys()):
                    if name in weight_map:
                        raise CheckpointError(
                            f"{self.path}: tensor {name} is in {weight_map[name]} and in {shard}, and no {INDEX_FILE} "
                            f"says which of them counts; leave one of the files out"
                        )
                    weight_map[name] = shard
        return weight_map

    def _find_shards(self) -> list[str]:
        files = sorted(file.name for file in self.path.glob("*.safetensors"))
        shards = [name for name in files if not name.startswith(_CONSOLIDATED)]
        if not shards:
            raise CheckpointError(
                f"{self.path} holds neither {INDEX_FILE} nor files named like {SINGLE_FILE}; only safetensors "
                f"checkpoints are read"
            )
        for name in shards:
            numbered = _NUMBERED.fullmatch(name)
            for number in range(1, int(numbered[3]) + 1) if numbered else ():
                sibling = f"{numbered[1]}-{number:05}-of-{numbered[3]}.safetensors" if numbered else ""
                if sibling not in shards:
                    raise CheckpointError(f"{self.path / sibling} is missing, {name} counts it; {self.remedy}")
        return shards

    def _open(self, shard: str) -> Any:
        path = self.path / shard
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a whole safetensors file ({error}); {self.remedy}") from None

    def _read_header(self, shard: str, expected: set[str]) -> None:
        path = self.path / shard
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing, {len(expected)} tensors of {INDEX_FILE} are in it; {self.remedy}"
            )
        with self._open(shard) as file:
            present = set(file.keys())
            if present != expected:
                name = min(present ^ expected)
                where = "not in the file" if name in expected else f"not in {INDEX_FILE}"
                raise CheckpointError(
                    f"{path}: tensor {name} is {where}, so they are not of one checkpoint; {self.remedy}"
                )
            for name in present:
                view = file.get_slice(name)
                shape, dtype = tuple(view.get_shape()), view.get_dtype()
                if dtype not in _BITS or (dtype == "F4" and (not shape or shape[-1] % 2)):
                    raise CheckpointError(
                        f"{path}: {name} is {dtype} {list(shape)}, which torch cannot hold, so it can be neither "
                        f"copied nor served; convert the original BF16 checkpoint, or leave that tensor out"
                    )
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


def check_utf8(path: Path) -> None:
    """Raises CheckpointError for a path that safetensors could not open, and no text could hold."""
    raw = os.fsencode(path.absolute())
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path} is not UTF-8 (there is a byte {raw[error.start]:#04x} in {os.fsdecode(raw[: error.end])}), and "
            f"safetensors opens no such path; choose another name"
        ) from None


def read_weight_map(index: Path, remedy: str) -> dict[str, str]:
    """See `parse_weight_map`; raises CheckpointError for the same, or where the file cannot be read."""
    try:
        return parse_weight_map(index.read_bytes(), str(index), remedy)
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read: {error.strerror}; {remedy}") from None
    except FormatError as error:
        raise CheckpointError(str(error)) from None


def _num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * _BITS[dtype] // 8
