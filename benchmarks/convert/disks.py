"""Destinations that cannot be written: a small disk that is too small, one that fills up on the way, a read-only one.

The disk is a tmpfs in a mount namespace of its own, so nobody has to be root (util-linux's `unshare`).
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.convert.measure import command, hashes

# Enough for what is around the shards and a part of them.
_LEFT_FREE = 100_000_000


def small_disk(source: Path, whole: Path, work: Path) -> dict[str, object]:
    """What each conversion to such a disk says, and what it leaves; `whole` is an unbroken one.

    Returns:
        `too_small`, `fills_up`, `read_only`: the exit status and the sentence that ends it; `left_under_final_name`,
        of all three; `resumed_equal`, whether the second, once there was room, became what an unbroken one is.

    Raises:
        CalledProcessError: there can be no such namespace here.
    """
    mount = work / "disk"
    mount.mkdir(parents=True, exist_ok=True)
    inside = ["unshare", "--map-root-user", "--mount", sys.executable, "-m", __spec__.name]
    paths = [str(source), str(whole), str(mount)]
    result: dict[str, object] = json.loads(subprocess.run([*inside, *paths], check=True, stdout=subprocess.PIPE).stdout)
    return result


def _inside(source: Path, whole: Path, mount: Path) -> dict[str, object]:
    packed = mount / "packed"
    size = sum(file.stat().st_size for file in whole.iterdir())
    _mount(mount, f"size={size // 2}")
    too_small = _end(_start(source, packed))
    left = packed.exists()
    # Room for twice the source, so that the converter begins.
    _mount(mount, f"remount,size={4 * size}")
    process = _start(source, packed)
    while process.poll() is None and not (mount / ".packed.partial" / "journal.jsonl").exists():
        time.sleep(0.001)
    with (mount / "other").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(mount).free - _LEFT_FREE)
    fills_up = _end(process)
    left |= packed.exists()
    (mount / "other").unlink()
    subprocess.run(command(source, packed, "--resume"), check=True, capture_output=True)
    equal = hashes(whole) == hashes(packed)
    _mount(mount, "remount,ro")
    read_only = _end(_start(source, mount / "again"))
    left |= (mount / "again").exists()
    return {
        "too_small": too_small,
        "fills_up": fills_up,
        "read_only": read_only,
        "left_under_final_name": left,
        "resumed_equal": equal,
    }


def _mount(mount: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(mount)], check=True)


def _start(source: Path, packed: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(command(source, packed), stderr=subprocess.PIPE, text=True)


def _end(process: "subprocess.Popen[str]") -> dict[str, object]:
    _, said = process.communicate()
    return {"status": process.returncode, "sentence": said.strip().splitlines()[-1], "traceback": "Traceback" in said}


if __name__ == "__main__":
    print(json.dumps(_inside(*map(Path, sys.argv[1:]))))
