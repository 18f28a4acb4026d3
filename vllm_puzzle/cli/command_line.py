"""The command line: `vllm-puzzle convert | verify | unpack | plan | inspect | tune`.

What a command needs is imported when it runs: torch and transformers take seconds, which `--help` need not wait for.
"""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import vllm_puzzle
from vllm_puzzle.cli.config_file import CommandParser, expand_config
from vllm_puzzle.cli.convert import add_convert, add_unpack, convert, unpack
from vllm_puzzle.cli.output import tell_error
from vllm_puzzle.cli.reports import add_inspect, add_plan, add_verify, inspect, plan, verify
from vllm_puzzle.cli.tune import add_tune, tune
from vllm_puzzle.offline.errors import CheckpointError

_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None]]] = {
    "convert": ("pack a checkpoint", add_convert, convert),
    "verify": ("check a packed checkpoint against its source", add_verify, verify),
    "unpack": ("write a packed checkpoint back in BF16", add_unpack, unpack),
    "plan": ("say what packing would save and where the model would fit", add_plan, plan),
    "inspect": ("show what a packed checkpoint holds", add_inspect, inspect),
    "tune": ("find the fastest tiles for a model on this GPU", add_tune, tune),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `vllm-puzzle`; returns the exit status."""
    parser = CommandParser(prog="vllm-puzzle", description="Packed expert pairs for vLLM.")
    parser.add_argument("--version", action="version", version=vllm_puzzle.__version__)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    commands = {name: subparsers.add_parser(name, help=summary) for name, (summary, *_) in _COMMANDS.items()}
    for name, command in commands.items():
        _add(name, command)
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0] not in commands:
        return _run(parser.parse_args(words))
    return _run(parser.parse_args([words[0], *_expand(commands[words[0]], words[1:])]))


def main_of(name: str, argv: Sequence[str] | None = None) -> int:
    """Runs one command under its own module name; returns the exit status."""
    parser = CommandParser(prog=f"python -m vllm_puzzle.{name}")
    _add(name, parser)
    return _run(parser.parse_args(_expand(parser, sys.argv[1:] if argv is None else argv)))


def _add(name: str, parser: CommandParser) -> None:
    _COMMANDS[name][1](parser)
    parser.set_defaults(command=name)


def _expand(parser: CommandParser, words: Sequence[str]) -> list[str]:
    try:
        return expand_config(parser, words)
    except ValueError as error:
        parser.error(str(error))


def _run(arguments: argparse.Namespace) -> int:
    with _terminable() as received:
        try:
            _COMMANDS[arguments.command][2](arguments)
            sys.stdout.flush()
        except CheckpointError as error:
            tell_error(arguments, str(error))
            return 1
        except BrokenPipeError:
            # Whoever read it, such as `head`, has seen enough; what is still buffered must not fail once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except KeyboardInterrupt as error:
            # What is said there knows more than the command does, such as what was kept.
            outcome = str(error) or getattr(arguments, "interrupted", "nothing was changed")
            tell_error(arguments, f"{'terminated' if received else 'interrupted'}; {outcome}", lead="")
            return 128 + (received or [signal.SIGINT])[0]
    return 0


@contextmanager
def _terminable() -> Iterator[list[int]]:
    """Has SIGTERM end a command as Ctrl-C does, cleaning up; the list then has its number."""
    received: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)
