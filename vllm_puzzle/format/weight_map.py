"""The index of a sharded checkpoint: which file holds each tensor."""

import json
from pathlib import Path
from typing import Any

from .layout import FormatError

INDEX_FILE = "model.safetensors.index.json"


def parse_weight_map(content: bytes, where: str, remedy: str) -> dict[str, str]:
    """The file of each tensor, by the tensor's name.

    Args:
        content: of INDEX_FILE; `where` is what an error message calls it.
        remedy: what the message advises.

    Raises:
        FormatError: it is no JSON, has no map of names to names, or names a file in another folder.
    """
    try:
        index: Any = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} cannot be read as JSON: {error}; {remedy}") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise FormatError(f"{where} has no `weight_map` that gives each tensor's file by its name; {remedy}")
    for shard in set(weight_map.values()):
        if Path(shard).name != shard:
            raise FormatError(f"{where} names a shard outside its own directory: {shard!r}; {remedy}")
    return weight_map
