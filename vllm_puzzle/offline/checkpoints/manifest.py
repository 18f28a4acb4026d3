"""What a packed checkpoint says of how it was written: a checksum per shard, and what converting did to each layer."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from vllm_puzzle.format import Strict

from ..errors import CheckpointError

MANIFEST_FILE = "puzzlemoe_manifest.json"

_AGAIN = "copy the packed checkpoint or convert its source again"


class ShardEntry(Strict):
    """One safetensors file; `num_bytes` and `sha256` are the whole file's."""

    file: str
    num_bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class LayerEntry(Strict):
    """One layer of pairs; fractions and errors are over its merged pairs, as the model card explains them.

    `estimated_loss` and `coactivation` are null where nothing was estimated, as without calibration.
    """

    layer: int = Field(ge=0)
    pairs: int = Field(ge=0)
    estimated_loss: float | None
    coactivation: float | None
    shared_fraction: float
    kept_fraction: float
    relative_error: float


class CodedLayerEntry(Strict):
    """One layer of coded experts; `bits` of codes a weight, on average.

    `estimated_loss`, relative to the squared residual stream, is null where it was not estimated. `relative_error` is
    `||W' - W||^2 / ||W||^2` over all its weights.
    """

    layer: int = Field(ge=0)
    bits: float
    estimated_loss: float | None
    relative_error: float


class Manifest(Strict):
    """The content of MANIFEST_FILE; `coded_layers` are only in version 2."""

    manifest_version: Literal[1, 2] = 1
    tool_version: str
    shards: list[ShardEntry]
    layers: list[LayerEntry] = Field(default_factory=list)
    coded_layers: list[CodedLayerEntry] = Field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The content as it is written."""
        content = self.model_dump()
        if self.manifest_version == 1:
            del content["coded_layers"]
        return content


def read_manifest(directory: Path) -> Manifest:
    """Raises CheckpointError where a packed checkpoint has none or breaks its schema."""
    path = directory / MANIFEST_FILE
    try:
        return Manifest.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; {_AGAIN}") from None
    except (OSError, ValueError) as error:
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            raise CheckpointError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; {_AGAIN}") from None
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); {_AGAIN}") from None


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
