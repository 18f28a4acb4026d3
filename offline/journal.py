"""A conversion that can be broken off at any point and gone on with: what is done, and what it was done from."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import CheckpointError
from .manifest import ShardEntry
from .writer import CheckpointWriter, publish, write_error

_JOURNAL_FILE = "journal.jsonl"
_STATES_FILE = "states-{}.safetensors"
_STATES_IN_WRITING = "states.partial"


class Journal:
    """The work directory of one conversion, beside its destination, with a line for every finished step.

    A line is written after all that it tells of, and counts only if it is whole.
    """

    def __init__(self, directory: Path, file: TextIO, steps: list[dict[str, Any]]) -> None:
        self.directory = directory
        self._file = file
        self._steps = steps

    @property
    def has_shards(self) -> bool:
        """Whether anything is there that took time."""
        return any("shards" in each["result"] for each in self._steps)

    def find(self, step: str) -> dict[str, Any] | None:
        """What was recorded of a step of an earlier run."""
        return next((each["result"] for each in self._steps if each["step"] == step), None)

    def record(self, step: str, result: Mapping[str, Any]) -> None:
        """Notes that `step` is done; `result` is JSON."""
        line = {"step": step, "result": dict(result)}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._steps.append(line)

    def save_states(self, number: int, states: Mapping[str, Tensor]) -> None:
        """Keeps the hidden states after `number` steps until those after the next are kept."""
        temporary = self.directory / _STATES_IN_WRITING
        save_file(dict(states), temporary)
        temporary.rename(self._states(number))

    def drop_states(self, number: int) -> None:
        """Forgets those of an earlier step."""
        self._states(number).unlink(missing_ok=True)

    def load_states(self, number: int) -> dict[str, Tensor]:
        """Those after `number` steps."""
        return load_file(self._states(number))

    def _states(self, number: int) -> Path:
        return self.directory / _STATES_FILE.format(number)

    def clear(self) -> None:
        """Leaves only what belongs to the checkpoint."""
        self._file.close()
        for pattern in (_JOURNAL_FILE, _STATES_FILE.format("*"), _STATES_IN_WRITING):
            for file in self.directory.glob(pattern):
                file.unlink()


@contextmanager
def work_directory(
    destination: Path, origin: Mapping[str, Any], resume: bool
) -> Iterator[tuple[CheckpointWriter, Journal]]:
    """A directory that becomes `destination` when the block ends well.

    It is kept where the block is broken off by the machine or by the user after a step was recorded, and removed where
    the source is at fault.

    Args:
        origin: what the result follows from, JSON; a run goes on only from the same.
        resume: go on with what an earlier run left.

    Raises:
        CheckpointError: an earlier run left something and `resume` is not set, or it left nothing and it is, or it
            had another origin, or its shards are no longer what it wrote; the disk is full or cannot be written.
    """
    directory = destination.absolute().parent / f".{destination.name}.partial"
    journal = None
    try:
        journal = _open(directory, destination, origin, resume)
        yield CheckpointWriter(directory), journal
        journal.clear()
        publish(directory, destination)
    except (OSError, SafetensorError) as error:
        kept = _keep_or_remove(directory, journal)
        raise CheckpointError(f"{destination} could not be written ({write_error(error)}); {kept}") from None
    except CheckpointError:
        if journal is not None:
            shutil.rmtree(directory, ignore_errors=True)
        raise
    except BaseException:
        _keep_or_remove(directory, journal)
        raise


def _open(directory: Path, destination: Path, origin: Mapping[str, Any], resume: bool) -> Journal:
    path = directory / _JOURNAL_FILE
    if not path.exists():
        # Without a journal there is nothing that counts.
        shutil.rmtree(directory, ignore_errors=True)
        if resume:
            raise CheckpointError(f"there is no broken-off conversion to {destination}; leave out --resume")
        directory.mkdir()
    elif not resume:
        raise CheckpointError(
            f"an earlier conversion to {destination} was broken off; go on with it by --resume, or remove {directory}"
        )
    # Opened before it is read: two runs must not go on with the same.
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise CheckpointError(f"another conversion is writing {directory}; wait for it") from None
    file.seek(0)
    steps = _read(file)
    journal = Journal(directory, file, steps)
    begun = journal.find("origin")
    if begun is None:
        journal.record("origin", origin)
    else:
        _compare(begun, origin, directory)
        _check_shards(directory, steps)
    return journal


def _read(file: TextIO) -> list[dict[str, Any]]:
    """The whole lines; cuts off what a kill left of another."""
    steps = []
    end = 0
    for line in file:
        try:
            step = json.loads(line)
        except ValueError:
            break
        if not line.endswith("\n"):
            break
        end += len(line.encode())
        steps.append(step)
    os.ftruncate(file.fileno(), end)
    file.seek(0, os.SEEK_END)
    return steps


def _compare(begun: Mapping[str, Any], origin: Mapping[str, Any], directory: Path) -> None:
    # As JSON has it: no tuples.
    now = json.loads(json.dumps(origin))
    for key in sorted(begun.keys() | now.keys()):
        if begun.get(key) != now.get(key):
            raise CheckpointError(
                f"{directory} was begun with {key} {begun.get(key)}, now it is {now.get(key)}; give what it was begun "
                f"with, or remove the folder and convert anew"
            )


def _check_shards(directory: Path, steps: list[dict[str, Any]]) -> None:
    for step in steps:
        for shard in step["result"].get("shards", []):
            entry = ShardEntry(**shard)
            path = directory / entry.file
            if not path.is_file() or path.stat().st_size != entry.num_bytes or sha256_of(path) != entry.sha256:
                raise CheckpointError(
                    f"{path} is not the {entry.num_bytes:,} bytes that were written; remove {directory} and convert "
                    f"anew"
                )


def sha256_of(path: Path) -> str:
    """Of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _keep_or_remove(directory: Path, journal: Journal | None) -> str:
    """Keeps what is worth to go on with; answers what a user may want to know."""
    if journal is not None and journal.has_shards:
        return f"{directory} keeps what is done, go on with it by --resume"
    if journal is not None:
        shutil.rmtree(directory, ignore_errors=True)
    return "nothing was left there"
