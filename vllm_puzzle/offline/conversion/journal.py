"""A conversion that can be interrupted at any point and resumed: what is done, and what it was done from."""

import fcntl
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

from ..checkpoints.destination import check_still_free, partial_path, publish, write_error
from ..checkpoints.manifest import ShardEntry, sha256_of
from ..checkpoints.writer import CheckpointWriter
from ..errors import CheckpointError

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
        """Whether a unit was written, which took time."""
        return any("shards" in each["result"] for each in self._steps)

    def find(self, step: str) -> dict[str, Any] | None:
        """The result of a recorded step, None where it was not done."""
        return next((each["result"] for each in self._steps if each["step"] == step), None)

    def record(self, step: str, result: Mapping[str, Any]) -> None:
        """Records that `step` is done; `result` is JSON."""
        line = {"step": step, "result": dict(result)}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._steps.append(line)

    def save_states(self, number: int, states: Mapping[str, Tensor]) -> None:
        """Saves the hidden states after `number` units."""
        temporary = self.directory / _STATES_IN_WRITING
        save_file(dict(states), temporary)
        temporary.rename(self._states(number))

    def drop_states(self, number: int) -> None:
        """Removes the hidden states after `number` units, if there are any."""
        self._states(number).unlink(missing_ok=True)

    def load_states(self, number: int) -> dict[str, Tensor]:
        """The hidden states after `number` units."""
        return load_file(self._states(number))

    def _states(self, number: int) -> Path:
        return self.directory / _STATES_FILE.format(number)

    def clear(self) -> None:
        """Removes all files that do not belong to the checkpoint."""
        for pattern in (_JOURNAL_FILE, _STATES_FILE.format("*"), _STATES_IN_WRITING):
            for file in self.directory.glob(pattern):
                file.unlink()

    def close(self) -> None:
        """Unlocks the directory for other runs."""
        self._file.close()


@contextmanager
def work_directory(
    destination: Path, origin: Mapping[str, Any], resume: bool
) -> Iterator[tuple[CheckpointWriter, Journal]]:
    """A directory that becomes `destination` when the block ends well.

    It is kept where the machine or the user ends the block after a step was recorded, and removed where the source is
    at fault.

    Args:
        origin: what the result follows from, JSON; a conversion is resumed only from the same.
        resume: resume what an earlier run left.

    Raises:
        CheckpointError: see `check_unfinished`; an earlier run had another origin, or its shards are no longer what it
            wrote; the disk is full or cannot be written, or something else has the name `destination` by now.
        KeyboardInterrupt: says what was kept.
    """
    directory = partial_path(destination)
    journal = None
    try:
        journal = _open(directory, destination, origin, resume)
        yield CheckpointWriter(directory), journal
        check_still_free(destination)
        journal.clear()
        publish(directory, destination)
    except (OSError, SafetensorError) as error:
        kept = _keep_or_remove(directory, journal)
        raise CheckpointError(f"{destination} could not be written ({write_error(error)}); {kept}") from None
    except CheckpointError:
        if journal is not None:
            shutil.rmtree(directory, ignore_errors=True)
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_keep_or_remove(directory, journal)) from None
    except BaseException:
        _keep_or_remove(directory, journal)
        raise
    finally:
        if journal is not None:
            journal.close()


def check_unfinished(destination: Path, resume: bool) -> None:
    """Checks for other conversions to `destination`, before anything takes time.

    Raises:
        CheckpointError: another run is writing there; or an earlier one left something and `resume` is not set, or it
            left nothing and it is.
    """
    path = partial_path(destination) / _JOURNAL_FILE
    if not path.exists():
        _check_resume([], destination, resume)
        return
    try:
        with open(path, "a+", encoding="utf-8") as file:
            _check_resume(_lock_and_read(file, destination), destination, resume)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def _open(directory: Path, destination: Path, origin: Mapping[str, Any], resume: bool) -> Journal:
    if resume and not (directory / _JOURNAL_FILE).exists():
        _check_resume([], destination, resume)
    directory.mkdir(exist_ok=True)
    file = open(directory / _JOURNAL_FILE, "a+", encoding="utf-8")  # noqa: SIM115
    try:
        steps = _lock_and_read(file, destination)
        _check_resume(steps, destination, resume)
        journal = Journal(directory, file, steps)
        if steps:
            _compare(steps[0]["result"], origin, directory)
            _check_shards(directory, steps)
        else:
            # Nothing counts that no journal tells of.
            for left in directory.iterdir():
                if left.name != _JOURNAL_FILE:
                    left.unlink()
            journal.record("origin", origin)
    except BaseException:
        file.close()
        raise
    return journal


def _lock_and_read(file: TextIO, destination: Path) -> list[dict[str, Any]]:
    # Locked before anything is said about it: a user who is told that a run was interrupted may remove what it left.
    busy = CheckpointError(f"another conversion is writing {destination}; wait for it, or choose another name")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise busy from None
    if os.fstat(file.fileno()).st_nlink == 0:
        # It finished since this file was opened.
        raise busy
    file.seek(0)
    return _read(file)


def _check_resume(steps: list[dict[str, Any]], destination: Path, resume: bool) -> None:
    if steps and not resume:
        raise CheckpointError(
            f"an earlier conversion to {destination} was interrupted; resume it with --resume, or remove "
            f"{partial_path(destination)} to start over"
        )
    if resume and not steps:
        raise CheckpointError(f"there is no interrupted conversion to {destination} to resume; leave out --resume")


def _read(file: TextIO) -> list[dict[str, Any]]:
    """The whole lines; a line that was cut short by a kill is removed."""
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
            then, here = (_given(key, options.get(key)) for options in (begun, now))
            raise CheckpointError(
                f"{directory} was begun {then}, now it is {here}; give what it was begun with, or remove the folder "
                f"and convert anew"
            )


def _given(key: str, value: Any) -> str:
    """An option as a user gives it, or leaves it out; a text is known by its checksum."""
    if value is None or value is False:
        return f"without {key}"
    if key == "--calibration":
        return f"with the {key} of SHA-256 {value}"
    return f"with {key}" if value is True else f"with {key} {value}"


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


def _keep_or_remove(directory: Path, journal: Journal | None) -> str:
    """Keeps what took time; returns a sentence on what was kept."""
    if journal is not None and journal.has_shards:
        return f"{directory} keeps what is done, run the same command with --resume to resume it"
    if journal is not None:
        shutil.rmtree(directory, ignore_errors=True)
    return "nothing was left there"
