"""The files of a checkpoint around its shards."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_puzzle.format import INDEX_FILE

from .shards import ShardLayout


class CheckpointWriter:
    """Writes the files around the shards into the folder of a checkpoint under construction."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def add_index(self, shards: Sequence[ShardLayout]) -> None:
        weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
        total = sum(tensor.num_bytes for shard in shards for tensor in shard.tensors)
        self.add_json(INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})

    def add_json(self, name: str, content: Mapping[str, Any]) -> None:
        self.add_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def add_text(self, name: str, content: str) -> None:
        (self.directory / name).write_text(content, encoding="utf-8")

    def add_copies(self, directory: Path, names: Iterable[Path]) -> None:
        """Files of another directory, under the paths `names` that they have below it."""
        for name in names:
            (self.directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(directory / name, self.directory / name)
