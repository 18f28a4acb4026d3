"""What a conversion's result follows from, so that one that was broken off goes on from nothing else."""

from dataclasses import asdict
from typing import Any

import vllm_puzzle
from vllm_puzzle.format import INDEX_FILE

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.manifest import sha256_of
from ..errors import CheckpointError
from .options import ConvertOptions

# Options that change nothing that is written.
_FREE = ("jobs", "ray")


def origin_of(checkpoint: Checkpoint, options: ConvertOptions) -> dict[str, Any]:
    """The version, every option that changes what is written, and the source's files, by the names a user knows.

    Of a shard its size and time of change stand for its content, which takes as long to read as to convert.

    Raises:
        CheckpointError: the calibration text cannot be read.
    """
    chosen = {f"--{name.replace('_', '-')}": value for name, value in asdict(options).items() if name not in _FREE}
    if options.calibration is not None:
        try:
            chosen["--calibration"] = sha256_of(options.calibration)
        except OSError as error:
            raise CheckpointError(f"calibration text {options.calibration} cannot be read: {error.strerror}") from None
    files: dict[str, Any] = {}
    for name in sorted({info.shard for info in checkpoint.tensors.values()}):
        status = (checkpoint.path / name).stat()
        files[name] = [status.st_size, status.st_mtime_ns]
    for name in ("config.json", INDEX_FILE):
        if (checkpoint.path / name).is_file():
            files[name] = sha256_of(checkpoint.path / name)
    return {"vllm-puzzle": vllm_puzzle.__version__, **chosen, **files}
