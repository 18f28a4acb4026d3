"""The command line: `vllm-puzzle convert | verify | unpack | plan | inspect | tune`."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

import vllm_puzzle
from vllm_puzzle.cli_config import add_config, expand_config
from vllm_puzzle.cli_reports import add_inspect, add_plan, inspect, plan
from vllm_puzzle.cli_tune import add_tune, tune

Command = Callable[[argparse.Namespace], None]


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of a sentence")


def _print(arguments: argparse.Namespace, result: dict[str, Any], sentence: str, path: Path) -> None:
    print(json.dumps({"path": str(path), **result}) if arguments.json else f"{path}: {sentence}")


def _add_convert(parser: argparse.ArgumentParser) -> None:
    # Imported here and not above: transformers takes seconds, which `--help` of another command need not wait for.
    from vllm_puzzle.offline.calibration import DEFAULT_SEQUENCES, SEQUENCE_LENGTH
    from vllm_puzzle.offline.options import DEFAULT_SHARD_SIZE
    from vllm_puzzle.offline.recipe import PAIRINGS, RULES

    parser.description = "Packs the experts of a Mixture-of-Experts checkpoint in pairs."
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder of a Hugging Face checkpoint (safetensors)")
    parser.add_argument("destination", type=Path, metavar="DEST", help="folder to write; must not exist")
    parser.add_argument(
        "--calibration",
        default="none",
        metavar="FILE|none",
        help="UTF-8 text to weigh the experts on; 'none' (the default) weighs by the weights' magnitudes alone",
    )
    parser.add_argument(
        "--calibration-sequences",
        type=int,
        default=DEFAULT_SEQUENCES,
        metavar="N",
        help=f"read at most N sequences of {SEQUENCE_LENGTH} tokens from it (default: %(default)s)",
    )
    parser.add_argument(
        "--rule",
        choices=RULES,
        help="how mates are merged (default: compensated where the machine does it in an hour a billion weights, "
        "saliency elsewhere and without calibration)",
    )
    parser.add_argument(
        "--align",
        action=argparse.BooleanOptionalAction,
        help="put mates' neurons in the order that merges best (default: as for --rule; never with paper)",
    )
    parser.add_argument(
        "--pairing",
        default="random",
        choices=PAIRINGS,
        help="mates at random, of least estimated loss, or that fire on the same tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--tau",
        type=float,
        default=0.4,
        help="for the rule paper: the largest relative difference of magnitudes that are shared (default: %(default)s)",
    )
    parser.add_argument(
        "--compression",
        type=float,
        default=50.0,
        metavar="PERCENT",
        help="how much smaller the experts become, 0 to 50, spent where it is estimated to cost least "
        "(default: %(default)g)",
    )
    parser.add_argument(
        "--max-expert-parallel",
        type=int,
        metavar="N",
        help="mates stay on one rank up to N expert-parallel ranks (default: the largest power of two up to 8 "
        "that leaves even blocks of at least 4 experts)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random pairing (default: %(default)s)")
    parser.add_argument("--device", default="cpu", metavar="cpu|cuda", help="where to compute (default: %(default)s)")
    parser.add_argument(
        "--shard-size",
        type=_size,
        default=DEFAULT_SHARD_SIZE,
        metavar="SIZE",
        help=f"of the largest file, as 500MB; no file holds two layers (default: {DEFAULT_SHARD_SIZE // 10**9}GB)",
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="layers at once, each in a process (default: %(default)s)"
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="merge them on this Ray cluster, which shares the file system ('auto': the one of this machine)",
    )
    parser.add_argument("--resume", action="store_true", help="go on with a conversion to DEST that was broken off")
    add_config(parser)
    _add_json(parser)


def _size(text: str) -> int:
    """Bytes, from a number with a unit of 1000s."""
    number = text.upper().removesuffix("B")
    factor = {"K": 10**3, "M": 10**6, "G": 10**9}.get(number[-1:])
    try:
        return int(float(number[:-1]) * factor) if factor else int(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it as 5GB or 500MB") from None


def _convert(arguments: argparse.Namespace) -> None:
    from vllm_puzzle.offline.convert import convert
    from vllm_puzzle.offline.options import ConvertOptions

    options = ConvertOptions(
        calibration=None if arguments.calibration == "none" else Path(arguments.calibration),
        calibration_sequences=arguments.calibration_sequences,
        rule=arguments.rule,
        tau=arguments.tau,
        align=arguments.align,
        pairing=arguments.pairing,
        compression=arguments.compression,
        max_expert_parallel=arguments.max_expert_parallel,
        seed=arguments.seed,
        device=arguments.device,
        shard_size=arguments.shard_size,
        jobs=arguments.jobs,
        ray=arguments.ray,
    )
    with _progress("converting") as progress:
        result = convert(arguments.source, arguments.destination, options, _say, progress, arguments.resume)
    _print(
        arguments,
        asdict(result),
        f"experts {result.expert_bytes_before:,} -> {result.expert_bytes_after:,} bytes, "
        f"checkpoint {result.checkpoint_bytes_before:,} -> {result.checkpoint_bytes_after:,} bytes, "
        f"relative error of merged weights {result.relative_error:.4f}",
        arguments.destination,
    )


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.description = "Checks a packed checkpoint against its source, tensor by tensor."
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the checkpoint that was converted")
    parser.add_argument("packed", type=Path, metavar="PACKED", help="what the converter wrote")
    _add_json(parser)


def _verify(arguments: argparse.Namespace) -> None:
    from vllm_puzzle.offline.verify import verify

    with _progress("verifying") as progress:
        result = verify(arguments.source, arguments.packed, progress)
    _print(
        arguments,
        asdict(result),
        f"{result.untouched} tensors equal to the source's bit for bit, {result.packed} packed tensors within their "
        f"rule",
        arguments.packed,
    )


def _add_unpack(parser: argparse.ArgumentParser) -> None:
    parser.description = "Writes a packed checkpoint back as a plain BF16 checkpoint."
    parser.add_argument("packed", type=Path, metavar="PACKED", help="what the converter wrote")
    parser.add_argument("destination", type=Path, metavar="DEST", help="folder to write; must not exist")


def _unpack(arguments: argparse.Namespace) -> None:
    from vllm_puzzle.offline.unpack import unpack_checkpoint

    with _progress("unpacking") as progress:
        unpack_checkpoint(arguments.packed, arguments.destination, progress)
    print(f"{arguments.destination}: every expert in BF16, in the layout of the hub")


@contextmanager
def _progress(verb: str) -> Iterator[Callable[[int, int], None]]:
    # disable=None: no bar where standard error is not a terminal.
    with tqdm(desc=verb, unit="B", unit_scale=True, disable=None, file=sys.stderr) as bar:

        def advance(num_bytes: int, total: int) -> None:
            bar.total = total
            bar.update(num_bytes)

        yield advance


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Command]] = {
    "convert": ("pack a checkpoint", _add_convert, _convert),
    "verify": ("check a packed checkpoint against its source", _add_verify, _verify),
    "unpack": ("write a packed checkpoint back in BF16", _add_unpack, _unpack),
    "plan": ("say what packing would save and where the model would fit", add_plan, plan),
    "inspect": ("show what a packed checkpoint holds", add_inspect, lambda arguments: inspect(arguments, _progress)),
    "tune": ("find the fastest tiles for a model on this GPU", add_tune, tune),
}


def _say(sentence: str) -> None:
    # Through tqdm, so that it stands above the bar and does not break it.
    tqdm.write(sentence, file=sys.stderr)


def _run(command: Command, arguments: argparse.Namespace) -> int:
    from vllm_puzzle.offline.errors import CheckpointError

    try:
        command(arguments)
        sys.stdout.flush()
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever read it, such as `head`, has seen enough; what is still buffered must not fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written under the final name", file=sys.stderr)
        return 130
    return 0


def main_of(name: str, argv: Sequence[str] | None = None) -> int:
    """Runs one command under its own module name; returns the exit status."""
    _, add_arguments, command = _COMMANDS[name]
    parser = argparse.ArgumentParser(prog=f"python -m vllm_puzzle.{name}")
    add_arguments(parser)
    return _run(command, _parse(parser, [], sys.argv[1:] if argv is None else argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `vllm-puzzle`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="vllm-puzzle", description="Packed expert pairs for vLLM.")
    parser.add_argument("--version", action="version", version=vllm_puzzle.__version__)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (summary, add_arguments, command) in _COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary)
        add_arguments(subparser)
        subparser.set_defaults(command=command)
    words = sys.argv[1:] if argv is None else list(argv)
    arguments = _parse(parser, words[:1], words[1:])
    return _run(arguments.command, arguments)


def _parse(parser: argparse.ArgumentParser, command: Sequence[str], words: Sequence[str]) -> argparse.Namespace:
    try:
        return parser.parse_args([*command, *expand_config(words)])
    except ValueError as error:
        parser.error(str(error))
