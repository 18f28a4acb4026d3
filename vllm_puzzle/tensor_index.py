"""Which tensors a checkpoint holds, read before vLLM loads them and from the same files."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .format import FormatError
from .host import get_hf_file_bytes

INDEX_FILE = "model.safetensors.index.json"

Shapes = dict[str, tuple[int, ...] | None]
"""By a tensor's name; None where only the name is known."""


def read_shapes(model: str, revision: str | None) -> Shapes:
    """What a folder's shards hold, or what the index of a hub's model lists.

    Empty where that cannot be known: of a model on the hub without an index, or a folder without shards, as dummy
    weights need none.

    Raises:
        FormatError: an index that does not say which shard holds what, or a shard that is missing, damaged or lacks a
            tensor that the index has in it.
    """
    folder = Path(model)
    if not folder.is_dir():
        content = get_hf_file_bytes(INDEX_FILE, model, revision)
        return {} if content is None else dict.fromkeys(_weight_map(content, f"{model}/{INDEX_FILE}"))
    index = folder / INDEX_FILE
    present = {path.name for path in folder.glob("*.safetensors")}
    if not index.is_file():
        return {name: shape for shard in sorted(present) for name, shape in _header(folder / shard).items()}
    weight_map = _weight_map(index.read_bytes(), str(index))
    shards = sorted(set(weight_map.values()))
    if present.isdisjoint(shards):
        return dict.fromkeys(weight_map)
    shapes: Shapes = {}
    for shard in shards:
        listed = {name for name, where in weight_map.items() if where == shard}
        if shard not in present:
            raise FormatError(
                f"{folder / shard} is missing, and {len(listed)} tensors of {INDEX_FILE} are in it; copy the "
                f"checkpoint again"
            )
        header = _header(folder / shard)
        lacking = sorted(listed - header.keys())
        if lacking:
            raise FormatError(
                f"{folder / shard} lacks {len(lacking)} of the tensors that {INDEX_FILE} has in it, the first is "
                f"{lacking[0]}; copy the checkpoint again"
            )
        shapes.update(header)
    return shapes


def _weight_map(content: bytes, where: str) -> dict[str, str]:
    try:
        index: Any = json.loads(content)
    except ValueError as error:
        raise FormatError(f"{where} cannot be read as JSON: {error}; copy the checkpoint again") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise FormatError(
            f"{where} has no `weight_map` that gives each tensor's file by its name; copy the checkpoint again"
        )
    return weight_map


def _header(shard: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(shard, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{shard} is not a whole safetensors file ({error}); copy the checkpoint again") from None
