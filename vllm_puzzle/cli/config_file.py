"""Options of a command from a YAML file, under the names that they have on the command line."""

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_CONFIG = "--config"


class CommandParser(argparse.ArgumentParser):
    """Remembers its arguments; an option is known by its whole name only, as in a file."""

    def __init__(self, **settings: Any) -> None:
        self.arguments: list[argparse.Action] = []
        super().__init__(allow_abbrev=False, **settings)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """See argparse."""
        action = super().add_argument(*names, **settings)
        self.arguments.append(action)
        return action


def add_config(parser: argparse.ArgumentParser) -> None:
    """The option that `expand_config` reads."""
    parser.add_argument(
        _CONFIG, metavar="FILE", help="YAML with options by their long names; command-line options take precedence"
    )


def expand_config(parser: CommandParser, words: Sequence[str]) -> list[str]:
    """The words of a command line with those of its `--config` file before them, so that the command line wins.

    `rule: paper` becomes `--rule=paper`, `resume: true` becomes `--resume` and `align: false` becomes `--no-align`; the
    parser then judges values as it does any others.

    Raises:
        ValueError: the file cannot be read, is no mapping, or has a name or a kind of value that `parser` does not
            know; one sentence.
    """
    options = {action.option_strings[0]: action for action in parser.arguments if action.option_strings}
    if _CONFIG not in options:
        return list(words)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument(_CONFIG, type=Path)
    try:
        path = finder.parse_known_args(words)[0].config
    except argparse.ArgumentError:
        # Without a value: the parser says so.
        path = None
    if path is None:
        return list(words)
    where = f"{_CONFIG} {path}"
    # What ends the command, and the file itself, cannot be in a file.
    names = [name.removeprefix("--") for name in options if name.startswith("--") and name != _CONFIG]
    positionals = [action.dest for action in parser.arguments if not action.option_strings]
    before: list[str] = []
    seen: set[str] = set()
    for key, value in _read(path, where):
        name = key.replace("_", "-")
        if name in seen:
            raise ValueError(f"{where} has {key} twice; leave one of them out")
        seen.add(name)
        if key in positionals:
            raise ValueError(f"{where}: {key} is given on the command line, not in a file; leave it out")
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(names))}"
            raise ValueError(f"{where}: there is no option {key}; {hint}")
        before += _option_words(where, key, options[f"--{name}"], value)
    return [*before, *words]


def _read(path: Path, where: str) -> list[tuple[str, Any]]:
    """Names and values in their order, repeated names included."""
    # Most command lines have no file and need no YAML.
    import yaml

    content: list[tuple[str, Any]] | None = None
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if isinstance(root, yaml.MappingNode):
            content = [(str(key.value), loader.construct_object(value, deep=True)) for key, value in root.value]
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror}; give a file that exists") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{where} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if content is None:
        raise ValueError(f"{where} holds no mapping; write one option a line, as `rule: paper`")
    return content


def _option_words(where: str, key: str, action: argparse.Action, value: Any) -> list[str]:
    option = action.option_strings[0]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{where}: {key} is {value!r}; write true or false")
        if value:
            return [option]
        negative = f"--no-{option.removeprefix('--')}"
        return [negative] if negative in action.option_strings else []
    if value is None:
        raise ValueError(f"{where}: {key} has no value; give one, or leave the line out")
    if isinstance(value, bool):
        raise ValueError(f"{where}: {key} is {str(value).lower()}; give one value, in quotes if it is a word")
    if not isinstance(value, str | int | float):
        raise ValueError(f"{where}: {key} is a {type(value).__name__}; give one value")
    return [f"{option}={value}"]
