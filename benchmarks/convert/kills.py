"""A conversion that is killed at random points and resumed, again and again."""

import random
import shutil
import subprocess
import time
from pathlib import Path

from benchmarks.convert.measure import command, hashes


def kill_and_resume(source: Path, whole: Path, work: Path, kills: int, seed: int) -> dict[str, object]:
    """Kills a conversion `kills` times, each time after a random share of what is left was written.

    Args:
        whole: an unbroken conversion of `source`.

    Returns:
        How many kills met it at work, and whether all files are those of an unbroken run.
    """
    generator = random.Random(seed)
    broken = work / "broken" / "packed"
    shutil.rmtree(broken.parent, ignore_errors=True)
    broken.parent.mkdir()
    total = _size(whole)
    partial = broken.parent / ".packed.partial"
    met = 0
    for left in range(kills, 0, -1):
        done = _size(partial)
        wanted = done + generator.uniform(0, 1.5 * (total - done) / left)
        resume = ["--resume"] if (partial / "journal.jsonl").exists() else []
        with subprocess.Popen(
            command(source, broken, *resume), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            # The file that was being written is begun again: growth counts from what is there when it starts.
            while process.poll() is None and _size(partial) <= wanted:
                time.sleep(0.001)
            met += process.poll() is None
            process.kill()
    if not broken.exists():
        subprocess.run(command(source, broken, "--resume"), check=True, capture_output=True)
    return {"kills": kills, "kills_while_writing": met, "bytes_equal": hashes(whole) == hashes(broken)}


def _size(path: Path) -> int:
    if not path.exists():
        return 0
    return sum(file.stat().st_size for file in path.glob("*.safetensors") if file.exists())
