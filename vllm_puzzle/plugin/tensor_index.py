"""Which tensors a checkpoint holds, read before vLLM loads them and from the same files."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..format import INDEX_FILE, FormatError, parse_weight_map
from .host import get_hf_file_bytes

_REMEDY = "copy the checkpoint again"

Shapes = dict[str, tuple[int, ...] | None]
"""Shapes of tensors by name; None where only the name is known."""


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
        return {} if content is None else dict.fromkeys(parse_weight_map(content, f"{model}/{INDEX_FILE}", _REMEDY))
    index = folder / INDEX_FILE
    present = {path.name for path in folder.glob("*.safetensors")}
    if not index.is_file():
        return {name: shape for shard in sorted(present) for name, shape in _header(folder / shard).items()}
    weight_map = parse_weight_map(index.read_bytes(), str(index), _REMEDY)
    shards = sorted(set(weight_map.values()))
    if present.isdisjoint(shards):
        return dict.fromkeys(weight_map)
    shapes: Shapes = {}
    for shard in shards:
        listed = {name for name, where in weight_map.items() if where == shard}
        if shard not in present:
            raise FormatError(
                f"{folder / shard} is missing, and {len(listed)} tensors of {INDEX_FILE} are in it; {_REMEDY}"
            )
        header = _header(folder / shard)
        lacking = sorted(listed - header.keys())
        if lacking:
            raise FormatError(
                f"{folder / shard} lacks {len(lacking)} of the tensors that {INDEX_FILE} has in it, the first is "
                f"{lacking[0]}; {_REMEDY}"
            )
        shapes.update(header)
    return shapes


def _header(shard: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(shard, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{shard} is not a whole safetensors file ({error}); {_REMEDY}") from None
