"""What a conversion's result follows from, so that an interrupted one is resumed from nothing else."""

from dataclasses import asdict
from typing import Any

import vllm_puzzle
from vllm_puzzle.format import INDEX_FILE

from ..checkpoints.manifest import sha256_of
from .job import Setup

# Options that change nothing that is written.
_FREE = ("jobs", "ray")


def origin_of(setup: Setup) -> dict[str, Any]:
    """The version, every option that changes what is written, and the source's files, by the names a user knows.

    A shard is known by its size and time of change: its content takes as long to read as to convert.
    """
    checkpoint, options = setup.checkpoint, asdict(setup.options)
    chosen = {f"--{name.replace('_', '-')}": value for name, value in options.items() if name not in _FREE}
    # Left open or given, it is the same.
    used = setup.methods[0].provenance()
    chosen |= {f"--{name}": used.get(name) for name in ("tau", "pairing", "compression")}
    if setup.calibration is not None:
        chosen["--calibration"] = setup.calibration.sha256
    files: dict[str, Any] = {}
    for name in sorted({info.shard for info in checkpoint.tensors.values()}):
        status = (checkpoint.path / name).stat()
        files[name] = [status.st_size, status.st_mtime_ns]
    for name in ("config.json", INDEX_FILE):
        if (checkpoint.path / name).is_file():
            files[name] = sha256_of(checkpoint.path / name)
    return {"vllm-puzzle": vllm_puzzle.__version__, **chosen, **files}
