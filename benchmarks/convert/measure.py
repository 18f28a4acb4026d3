"""Runs of the converter as a user starts it, watched from outside."""

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Run:
    """Wall-clock `seconds` from the command to the data on disk; most memory at once, of all its processes together."""

    seconds: float
    peak_rss_bytes: int


def command(source: Path, packed: Path, *options: str) -> list[str]:
    """The converter's command line, with the paper's rule and without calibration."""
    return [sys.executable, "-m", "vllm_puzzle.convert", str(source), str(packed), "--rule", "paper", *options]


def convert_unbroken(source: Path, folder: Path) -> Path:
    """A conversion for others to be compared with, made anew in `folder`; its name in there is `packed`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    subprocess.run(command(source, folder / "packed"), check=True, capture_output=True)
    return folder / "packed"


def hashes(path: Path) -> dict[str, str]:
    """SHA-256 of every file of a directory."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())}


def forget(path: Path) -> None:
    """Asks the kernel to drop a directory's files from the page cache, so that the next reader reads the disk."""
    for file in path.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def flush(path: Path) -> None:
    """Waits until a directory's files are on the disk."""
    for file in path.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def copy(source: Path, destination: Path) -> float:
    """Seconds to copy all files, by the kernel's own means, and have them on disk."""
    shutil.rmtree(destination, ignore_errors=True)
    forget(source)
    start = time.perf_counter()
    shutil.copytree(source, destination)
    flush(destination)
    return time.perf_counter() - start


def convert(source: Path, packed: Path, jobs: int) -> Run:
    """Raises CalledProcessError where the converter fails."""
    shutil.rmtree(packed, ignore_errors=True)
    forget(source)
    start = time.perf_counter()
    with subprocess.Popen(command(source, packed, "--jobs", str(jobs))) as process:
        watch = _Watch(process.pid)
        watch.start()
        status = process.wait()
        watch.join()
    if status:
        raise subprocess.CalledProcessError(status, process.args)
    flush(packed)
    return Run(time.perf_counter() - start, watch.peak)


class _Watch(threading.Thread):
    """Adds up, many times a second, the resident memory of a process and its children: pages they share count twice."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process(pid)
        self.peak = 0

    def run(self) -> None:
        while self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE:
            total = 0
            try:
                for process in (self._process, *self._process.children(recursive=True)):
                    total += process.memory_info().rss
            except psutil.NoSuchProcess:
                pass
            self.peak = max(self.peak, total)
            time.sleep(0.01)
