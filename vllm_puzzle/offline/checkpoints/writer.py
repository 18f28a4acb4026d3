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

from vllm_puzzle.format import INDEX_FILE

from ..errors import CheckpointError
from ..wording import size
from .checkpoint import check_utf8
from .shards import ShardPlan

# Of bytes: what a temporary name adds to that of a folder, and to its path with the files in it.
_ROOM_IN_NAME = len(".") + len(".12345678.partial")
_ROOM_IN_PATH = 128


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


def check_destination(destination: Path) -> None:
    """Raises CheckpointError where a folder `destination` exists or cannot be made."""
    if os.path.lexists(destination):
        raise CheckpointError(f"{destination} exists already; choose another name or remove it")
    check_utf8(destination)
    parent = destination.absolute().parent
    if not os.path.isdir(parent):
        if os.path.lexists(parent):
            raise CheckpointError(f"{parent} is no folder, so {destination} cannot be written there; choose another")
        raise CheckpointError(f"{parent} does not exist, so {destination} cannot be written there; make it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{parent} is not writable, so {destination} cannot be written there")
    # While it is written the folder has a longer name, and longer paths lie in it.
    name = os.fsencode(destination.name)
    longest = os.pathconf(parent, "PC_NAME_MAX") - _ROOM_IN_NAME
    if len(name) > longest:
        raise CheckpointError(
            f"the name of {destination} is {len(name)} bytes long and may have {longest} there; choose a shorter one"
        )
    whole = len(os.fsencode(parent)) + len(name)
    if whole > os.pathconf(parent, "PC_PATH_MAX") - _ROOM_IN_PATH:
        raise CheckpointError(
            f"the path of {destination} is {whole} bytes long, which is too long; choose another folder"
        )


def check_room(destination: Path, num_bytes: int) -> None:
    """Raises CheckpointError where `num_bytes` do not fit on the disk of `destination`."""
    free = shutil.disk_usage(destination.absolute().parent).free
    if free < num_bytes:
        raise CheckpointError(
            f"{destination} needs {size(num_bytes)} and its disk has {size(free)} free; make room first"
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
