"""Options of a command from a YAML file, under the names that they have on the command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


def add_config(parser: argparse.ArgumentParser) -> None:
    """The option that `expand_config` reads."""
    parser.add_argument(
        "--config", metavar="FILE", help="YAML with options by their long names; the command line goes before it"
    )


def expand_config(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments with those of a `--config` file before them, so that later ones win.

    `rule: paper` becomes `--rule paper`, `resume: true` becomes `--resume` and `align: false` becomes `--no-align`; the
    parser then judges names and values as it does any others.

    Raises:
        ValueError: the file cannot be read, or is no mapping of names to single values; one sentence.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config", type=Path)
    path = finder.parse_known_args(arguments)[0].config
    if path is None:
        return list(arguments)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config {path} holds no mapping; write one option a line, as `rule: paper`")
    before = [word for name, value in content.items() for word in _words(path, name, value)]
    return [*before, *arguments]


def _words(path: Path, name: object, value: Any) -> list[str]:
    option = str(name).replace("_", "-")
    if value is True:
        return [f"--{option}"]
    if value is False:
        return [f"--no-{option}"]
    if isinstance(value, str | int | float):
        return [f"--{option}={value}"]
    raise ValueError(f"--config {path}: {name} is a {type(value).__name__}; give one value")
