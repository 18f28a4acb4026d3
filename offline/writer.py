"""Writing a checkpoint directory that appears under its final name only when it is whole."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .checkpoint import INDEX_FILE
from .errors import CheckpointError
from .shards import ShardPlan


class CheckpointWriter:
    """The files around the shards of a checkpoint under construction."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def add_index(self, shards: Sequence[ShardPlan]) -> None:
        weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
        total = sum(tensor.num_bytes for shard in shards for tensor in shard.tensors)
        self.add_json(INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})

    def add_json(self, name: str, content: Mapping[str, Any]) -> None:
        self.add_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def add_text(self, name: str, content: str) -> None:
        (self.directory / name).write_text(content, encoding="utf-8")

    def add_copies(self, directory: Path, names: Iterable[Path]) -> None:
        """Files of another directory, under the paths `names` that they have below it."""
        for name in names:
            (self.directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(directory / name, self.directory / name)


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
def new_checkpoint(destination: Path) -> Iterator[CheckpointWriter]:
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
        yield CheckpointWriter(temporary)
        publish(temporary, destination)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{destination} could not be written ({write_error(error)}); nothing was left there"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, destination: Path) -> None:
    """Gives a finished directory its final name."""
    # mkdtemp makes its directory private; a checkpoint is as readable as any other file of this user.
    mask = _umask()
    temporary.chmod(0o777 & ~mask)
    for path in temporary.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
    temporary.rename(destination)


def write_error(error: Exception) -> str:
    """Why a file could not be written, for a sentence."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left" in str(error):
        return "the disk is full; make room and run again"
    return str(error)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
