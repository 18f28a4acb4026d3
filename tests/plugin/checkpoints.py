"""Packed checkpoints for the tests of the plugin, and ways of spoiling one."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.coded import store_layers, uneven
from tests.plugin.engine import MORE_UNDECLARED, SERVED, UNDECLARED
from tests.tiny import NUM_EXPERTS, build_tiny, dated_text
from vllm_puzzle.cli import main
from vllm_puzzle.format import LayerCodes

INDEX = "model.safetensors.index.json"
# That of layer 1 in a packed tiny Mixtral.
SHARD = "model-00003-of-00004.safetensors"

TEXT = dated_text(200)

# What the first layers with experts hold: pairs, codes of all widths, experts as they were, codes of one width.
KINDS = ("pairs", "uneven", "plain", "even")


def pack_and_unpack(source: Path, folder: Path, text: str) -> tuple[Path, Path]:
    """Converts `source` at 50 % and unpacks the result; returns both folders."""
    calibration = folder / "text.txt"
    calibration.write_text(text)
    packed, unpacked = folder / "packed", folder / "unpacked"
    # The fastest rule: what words say is the same whichever rule wrote them.
    options = ["--calibration", str(calibration), "--rule", "paper"]
    assert main(["convert", str(source), str(packed), *options]) == 0
    assert main(["unpack", str(packed), str(unpacked)]) == 0
    return packed, unpacked


def mix(source: Path, packed: Path, unpacked: Path | None = None, kinds: Sequence[str] = KINDS) -> None:
    """Stores the layers of a packed checkpoint as these kinds, in place; those beyond stay as they are.

    `source` is what it was converted from, `unpacked` its twin.
    """
    section = json.loads((packed / "config.json").read_text())["quantization_config"]
    stored: dict[int, LayerCodes | None] = {}
    for layer, kind in zip((each["layer"] for each in section["layers"]), kinds, strict=False):
        if kind != "pairs":
            codes = uneven(layer, NUM_EXPERTS) if kind == "uneven" else LayerCodes.even(layer, NUM_EXPERTS, 6)
            stored[layer] = None if kind == "plain" else codes
    store_layers(packed, source, stored, unpacked)


class Checkpoints:
    """Each family that vLLM serves on a CPU as a (packed, unpacked) checkpoint, made when it is first asked for.

    Making all of them takes a minute, and most files of tests need one.
    """

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders
        self._made: dict[str, tuple[Path, Path, Path]] = {}
        self._mixed: dict[tuple[str, tuple[str, ...]], tuple[Path, Path]] = {}

    def __getitem__(self, family: str) -> tuple[Path, Path]:
        """With packed pairs in every layer."""
        return self._make(family)[:2]

    def mixed(self, family: str, kinds: tuple[str, ...] = KINDS) -> tuple[Path, Path]:
        """With layers of these kinds."""
        if (family, kinds) not in self._mixed:
            *twins, source = self._make(family)
            packed, unpacked = (copytree(twin, twin.with_name("_".join((twin.name, *kinds)))) for twin in twins)
            mix(source, packed, unpacked, kinds)
            self._mixed[family, kinds] = packed, unpacked
        return self._mixed[family, kinds]

    def _make(self, family: str) -> tuple[Path, Path, Path]:
        if family not in self._made:
            folder = self._folders.mktemp(family)
            source = build_tiny(family, folder / "source", **(SERVED | UNDECLARED | MORE_UNDECLARED)[family])
            self._made[family] = (*pack_and_unpack(source, folder, TEXT), source)
        return self._made[family]


def edit_config(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((path / "config.json").read_text())
    edit(config)
    (path / "config.json").write_text(json.dumps(config))


def edit_shard(path: Path, edit: Callable[[dict[str, torch.Tensor]], None], follow: bool) -> None:
    """Changes the shard of layer 1; with `follow` the index tells of it, without it claims the old names."""
    tensors = load_file(path / SHARD)
    old = set(tensors)
    edit(tensors)
    save_file(tensors, path / SHARD, {"format": "pt"})
    if follow:
        index = json.loads((path / INDEX).read_text())
        for name in old - set(tensors):
            del index["weight_map"][name]
        index["weight_map"].update(dict.fromkeys(tensors, SHARD))
        (path / INDEX).write_text(json.dumps(index))


def a_packed_name(path: Path) -> str:
    return min(name for name in load_file(path / SHARD) if name.endswith("w3.weight_packed"))
