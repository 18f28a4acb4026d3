"""What commands print: a text or one JSON object, on any terminal, and a progress bar while they work."""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from vllm_puzzle.offline.progress import Progress


def add_json(parser: argparse.ArgumentParser, path: str) -> None:
    """Adds the option `--json`; `path` is the name of the argument that the result is about."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(about=path)


def tell(arguments: argparse.Namespace, result: Mapping[str, Any], text: str) -> None:
    """Prints `text`, or `result` as one JSON object with `--json`."""
    _put(_object(arguments, result=result) if arguments.json else text, sys.stdout)


def tell_error(arguments: argparse.Namespace, sentence: str, lead: str = "error: ") -> None:
    """Prints why there is no result on standard error, after `lead`, and with `--json` on standard output too."""
    _put(lead + sentence, sys.stderr)
    if "about" in arguments and arguments.json:
        _put(_object(arguments, error=sentence), sys.stdout)


def say(sentence: str) -> None:
    """Prints a sentence on standard error while a command works."""
    from tqdm import tqdm

    # Through tqdm, which puts it above the bar.
    tqdm.write(_printable(sentence, sys.stderr), file=sys.stderr)


@contextmanager
def progress_bar(verb: str) -> Iterator[Progress]:
    """A bar of bytes on standard error."""
    from tqdm import tqdm

    # disable=None: no bar where standard error is not a terminal.
    with tqdm(desc=verb, unit="B", unit_scale=True, disable=None, file=sys.stderr) as bar:

        def advance(num_bytes: int, total: int) -> None:
            bar.total = total
            bar.update(num_bytes)

        yield advance


def _object(arguments: argparse.Namespace, **content: Any) -> str:
    about = getattr(arguments, arguments.about)
    path = None if about is None else str(about)
    return json.dumps({"command": arguments.command, "path": path, **content})


def _put(text: str, stream: TextIO) -> None:
    print(_printable(text, stream), file=stream)


def _printable(text: str, stream: TextIO) -> str:
    """`text` with an escape for every character that a stream cannot encode, as Python writes them to stderr."""
    # None for streams in memory, which take every character.
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
