"""The folder a command writes: checked beforehand, and under its final name only when it is whole."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import CheckpointError
from ..wording import size
from .checkpoint import check_utf8
from .writer import CheckpointWriter

_PARTIAL = ".partial"

# Of bytes: what a temporary name adds to that of a folder, and to its path with the files in it.
_ROOM_IN_NAME = len(".") + len(".12345678" + _PARTIAL)
_ROOM_IN_PATH = 128


def check_destination(destination: Path, source: Path) -> None:
    """Raises CheckpointError where a folder `destination` exists, cannot be made, or would lie in `source`."""
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
    if shutil.disk_usage(parent).total == 0:
        raise CheckpointError(f"{parent} is on a file system that holds no files, as /proc is; choose another folder")
    # Links followed: what is read would change while it is read, and be copied into itself.
    if Path(os.path.realpath(parent)).is_relative_to(os.path.realpath(source)):
        raise CheckpointError(f"{destination} lies in {source}, which is read; choose a folder outside it")
    # While it is written the folder has a longer name, and its files have longer paths.
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
        temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=_PARTIAL, dir=parent))
    except OSError as error:
        raise CheckpointError(f"{destination} cannot be written: {error.strerror}") from None
    try:
        yield CheckpointWriter(temporary)
        check_still_free(destination)
        publish(temporary, destination)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{destination} could not be written ({write_error(error)}); nothing was left there"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def partial_path(destination: Path) -> Path:
    """The folder in which a conversion that can be resumed writes what becomes `destination`."""
    return destination.absolute().parent / f".{destination.name}{_PARTIAL}"


def check_still_free(destination: Path) -> None:
    """Raises FileExistsError where something has that name by now: publishing would replace an empty folder."""
    if os.path.lexists(destination):
        raise FileExistsError("something of that name was made meanwhile; remove it")


def publish(temporary: Path, destination: Path) -> None:
    """Gives a finished folder its final name, and its files the modes that the user's new files have."""
    # mkdtemp makes its folder private.
    mask = _umask()
    temporary.chmod(0o777 & ~mask)
    for path in temporary.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
    temporary.rename(destination)


def write_error(error: Exception) -> str:
    """The reason why a file could not be written, for a sentence."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left" in str(error):
        return "the disk is full; make room and run again"
    return str(error)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
