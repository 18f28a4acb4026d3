"""The parent: stages as processes with limits, their lines on disk, and a time that is kept whatever they do.

Nothing here touches the card: a kernel that reads out of bounds poisons its process for good, and no other.
"""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

Row = dict[str, Any]

# What the end of a session needs for itself: killing what runs, and the summary.
RESERVE = 3.0
# A stage that would have less is not begun: importing torch takes as long.
LEAST = 5.0
_OUTPUT_CHARACTERS = 3000


@dataclass(frozen=True)
class Stage:
    """A process to run.

    Attributes:
        limit: seconds until it is killed, and all that it started.
        environment: what is added to this process's own.
    """

    name: str
    command: Sequence[str]
    limit: float
    environment: Mapping[str, str] = field(default_factory=dict)


class Session:
    """Runs stages and keeps their lines; use it as a context, which ends what still runs.

    Args:
        out: the folder of session.jsonl; made if it is not there.
        seconds: from now until all stages have ended.
    """

    def __init__(self, out: Path, seconds: float) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        self.rows: list[Row] = []
        self._file = (out / "session.jsonl").open("a", encoding="utf-8")
        self._begin, self._seconds = time.monotonic(), seconds
        self._changed = threading.Condition()
        self._running: list[Running] = []

    def __enter__(self) -> Self:
        # Whoever ends the parent from outside ends the stages too, which are sessions of their own.
        self._handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
        return self

    def __exit__(self, *_: object) -> None:
        for running in list(self._running):
            self.end(running)
        signal.signal(signal.SIGTERM, self._handler)
        self._file.close()

    @property
    def left(self) -> float:
        """Seconds for stages."""
        return self._seconds - RESERVE - (time.monotonic() - self._begin)

    def write(self, **fields: Any) -> None:
        """A line on the disk, and then on standard output."""
        with self._changed:
            row = {"at": round(time.monotonic() - self._begin, 1), **fields}
            line = json.dumps(row)
            self._file.write(line + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self.rows.append(row)
            self._changed.notify_all()
        with contextlib.suppress(BrokenPipeError):
            print(line if len(line) < 300 else f"{line[:297]}...", flush=True)

    def start(self, stage: Stage) -> "Running | None":
        """Begins a stage beside others; None where there is no time left."""
        if min(stage.limit, self.left) < LEAST:
            self.write(what="stage", stage=stage.name, skipped=f"{max(0.0, self.left):.0f} seconds are left")
            return None
        running = Running(stage, self)
        self._running.append(running)
        return running

    def end(self, running: "Running") -> None:
        """Kills a stage that still runs; what it has written is kept."""
        running.finish(0)
        self._running.remove(running)

    def run(self, stage: Stage) -> bool:
        """Runs a stage to its end or its limit; whether it ended well."""
        running = self.start(stage)
        if running is None:
            return False
        well = running.finish(min(stage.limit, self.left))
        self._running.remove(running)
        return well

    def wake(self) -> None:
        """Has `wait` look again."""
        with self._changed:
            self._changed.notify_all()

    def wait(self, happened: Callable[[Sequence[Row]], bool], limit: float) -> bool:
        """Waits until something has happened, which is asked with the lines so far; whether it has."""
        end = time.monotonic() + min(limit, self.left)
        with self._changed:
            while not happened(self.rows):
                if not self._changed.wait(max(0.0, end - time.monotonic())):
                    return happened(self.rows)
        return True


class Running:
    """A stage that was begun; only its `Session` ends it.

    Attributes:
        over: whether it has written its last line.
    """

    def __init__(self, stage: Stage, session: Session) -> None:
        self._stage, self._session = stage, session
        self._begin, self._others = time.monotonic(), ""
        self.over = False
        self._process = subprocess.Popen(
            stage.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            env={**os.environ, **stage.environment},
        )
        # Not in the caller's thread: a process that left the group may keep the pipe open.
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                with contextlib.suppress(ValueError):  # The session is over and its file closed.
                    self._session.write(**{"stage": self._stage.name} | row)
            else:
                self._others = (self._others + line)[-_OUTPUT_CHARACTERS:]
        self.over = True
        self._session.wake()

    def finish(self, limit: float) -> bool:
        """Waits so long, then kills; whether it ended by itself and well."""
        killed = False
        try:
            self._process.wait(limit)
        except subprocess.TimeoutExpired:
            killed = True
        # Also what an ended process left behind in its group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        status = self._process.wait()
        self._reader.join(1)
        self._session.write(
            what="stage",
            stage=self._stage.name,
            status=status,
            # Told to end and out of time are two things.
            ended="at its limit" if killed and limit else "when no longer needed" if killed else "by itself",
            seconds=round(time.monotonic() - self._begin, 1),
            output=self._others,
        )
        return status == 0
