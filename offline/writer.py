"""Writing a checkpoint directory that appears under its final name only when it is whole."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from .checkpoint import INDEX_FILE
from .errors import CheckpointError


class CheckpointWriter:
    """Shards, index and small files of a checkpoint under construction."""

    def __init__(self, directory: Path, num_shards: int) -> None:
        self.directory = directory
        self._num_shards = num_shards
        self._weight_map: dict[str, str] = {}
        self.num_bytes = 0

    def add_shard(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Writes the next shard."""
        number = len(set(self._weight_map.values())) + 1
        shard = f"model-{number:05}-of-{self._num_shards:05}.safetensors"
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, self.directory / shard, {"format": "pt"}
        )
        self._weight_map.update(dict.fromkeys(tensors, shard))
        self.num_bytes += sum(tensor.nbytes for tensor in tensors.values())

    def add_index(self) -> None:
        assert len(set(self._weight_map.values())) == self._num_shards
        weight_map = dict(sorted(self._weight_map.items()))
        self.add_json(INDEX_FILE, {"metadata": {"total_size": self.num_bytes}, "weight_map": weight_map})

    def add_json(self, name: str, content: Mapping[str, Any]) -> None:
        self.add_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def add_text(self, name: str, content: str) -> None:
        (self.directory / name).write_text(content, encoding="utf-8")

    def add_copy(self, file: Path) -> None:
        shutil.copyfile(file, self.directory / file.name)


def check_destination(destination: Path, num_bytes: int) -> None:
    """Raises CheckpointError where `destination` exists, cannot be made, or `num_bytes` do not fit on its disk."""
    if destination.exists() or destination.is_symlink():
        raise CheckpointError(f"{destination} exists already; choose another name or remove it")
    parent = destination.absolute().parent
    if not parent.is_dir():
        raise CheckpointError(f"{parent} does not exist, so {destination} cannot be written there; make it first")
    if not os.access(parent, os.W_OK):
        raise CheckpointError(f"{parent} is not writable, so {destination} cannot be written there")
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise CheckpointError(
            f"{destination} needs {num_bytes / 1e9:.3f} GB and its disk has {free / 1e9:.3f} GB free; make room first"
        )


@contextmanager
def new_checkpoint(destination: Path, num_shards: int) -> Iterator[CheckpointWriter]:
    """A writer whose directory gets the name `destination` when the block ends well and is removed when it does not.

    Raises:
        CheckpointError: the disk is full or cannot be written.
    """
    try:
        parent = destination.absolute().parent
        temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".partial", dir=parent))
    except OSError as error:
        raise CheckpointError(f"{destination} cannot be written: {error.strerror}") from None
    try:
        yield CheckpointWriter(temporary, num_shards)
        # mkdtemp and safetensors make theirs private; a checkpoint is as readable as any other file of this user.
        mask = _umask()
        temporary.chmod(0o777 & ~mask)
        for file in temporary.iterdir():
            file.chmod(0o666 & ~mask)
        temporary.rename(destination)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{destination} could not be written ({_reason(error)}); nothing was left there"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _reason(error: Exception) -> str:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left" in str(error):
        return "the disk is full; make room and run again"
    return str(error)
