"""The files of a checkpoint besides config and weights: which of them belong to the model, and travel with it."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .manifest import MANIFEST_FILE

# Written anew for every checkpoint.
_OURS = {"config.json", MANIFEST_FILE, "README.md"}

# Tokenizers and processors in all their formats, configs, templates, code and texts.
_KINDS = {
    ".bpe",
    ".jinja",
    ".json",
    ".md",
    ".merges",
    ".model",
    ".py",
    ".spm",
    ".tiktoken",
    ".txt",
    ".vocab",
    ".yaml",
    ".yml",
}

# Weights, whatever tool they are for, and what a training run keeps beside them.
_WEIGHTS = {
    ".bin",
    ".ckpt",
    ".distcp",
    ".gguf",
    ".h5",
    ".msgpack",
    ".npy",
    ".npz",
    ".onnx",
    ".onnx_data",
    ".ot",
    ".pkl",
    ".pt",
    ".pth",
    ".safetensors",
    ".tflite",
}

# They describe the weights of the source, which are others in what is written.
_OF_OTHER_WEIGHTS = {"hf_quant_config.json", "quant_config.json", "quantize_config.json"}


def find_other_files(directory: Path) -> list[Path]:
    """The paths of these files below `directory`, sorted.

    By kind: tokenizer and processor files, configs, chat templates, model code and texts, at the top and in folders.
    Files that a config at the top names travel whatever they are called. A folder at the top that holds weights is a
    copy of the model for other tools, and stays; so do hidden files, and weights anywhere.
    """
    found = {file for file in _visible(directory) if _has_kind(file)} | set(_named(directory))
    for folder in sorted(directory.iterdir()):
        if folder.is_dir() and not folder.name.startswith((".", "__")):
            below = list(_below(folder))
            if not any(_is_weights(file) for file in below):
                found.update(file for file in below if _has_kind(file))
    names = {file.relative_to(directory) for file in found}
    return sorted(name for name in names if str(name) not in _OURS | _OF_OTHER_WEIGHTS)


def _visible(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")]


def _below(folder: Path) -> Iterator[Path]:
    for root, folders, _ in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        yield from _visible(Path(root))


def _has_kind(file: Path) -> bool:
    is_text = file.suffix in _KINDS or file.name.upper().startswith(("LICENSE", "NOTICE"))
    # `pytorch_model.bin.index.json` says where weights are that stay.
    return is_text and ".index." not in file.name


def _is_weights(file: Path) -> bool:
    return file.suffix in _WEIGHTS


def _named(directory: Path) -> Iterator[Path]:
    """The files that a config at the top names, as `"vocab_file": "words.dat"`."""
    for config in directory.glob("*config.json"):
        try:
            texts = list(_texts(json.loads(config.read_text(encoding="utf-8"))))
        except (OSError, ValueError, RecursionError):
            # It is copied all the same.
            continue
        for text in texts:
            path = Path(text)
            # No path that leads out of the folder, and no text that is no path.
            if len(text) > 255 or "\0" in text or path.is_absolute() or ".." in path.parts or path.name.startswith("."):
                continue
            file = directory / path
            if file.is_file() and not _is_weights(file):
                yield file


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict | list):
        for each in content.values() if isinstance(content, dict) else content:
            yield from _texts(each)
