"""The commands that write a checkpoint: `vllm-puzzle convert | unpack`."""

import argparse
from dataclasses import asdict
from pathlib import Path

from vllm_puzzle.cli.config_file import add_config
from vllm_puzzle.cli.output import add_json, progress_bar, say, tell
from vllm_puzzle.cli.paths import given_path, given_text
from vllm_puzzle.offline.defaults import (
    CODE_RULE,
    DEFAULT_COMPRESSION,
    DEFAULT_DEVICE,
    DEFAULT_JOBS,
    DEFAULT_PAIRING,
    DEFAULT_SEED,
    DEFAULT_SEQUENCES,
    DEFAULT_SHARD_SIZE,
    DEFAULT_TAU,
    SEQUENCE_LENGTH,
)
from vllm_puzzle.offline.merging.recipe import PAIRINGS
from vllm_puzzle.offline.merging.rules import RULES
from vllm_puzzle.offline.wording import size


def add_convert(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Packs the experts of a Mixture-of-Experts checkpoint in pairs, whose two experts are called mates, or with "
        "--bits as codes of 2 to 4 bits a weight."
    )
    parser.add_argument(
        "source", type=given_path, metavar="SOURCE", help="folder of a Hugging Face checkpoint (safetensors)"
    )
    parser.add_argument("destination", type=given_path, metavar="DEST", help="folder to write; must not exist")
    _add_calibration(parser)
    _add_merging(parser)
    _add_pairing(parser)
    _add_codes(parser)
    _add_running(parser)
    add_config(parser)
    add_json(parser, path="destination")
    parser.set_defaults(interrupted="nothing was written")


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibration",
        type=given_text,
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


def _add_merging(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rule",
        choices=[*RULES, CODE_RULE],
        help="how mates are merged (default: compensated where the machine takes at most an hour per billion weights, "
        f"saliency elsewhere and without calibration; {CODE_RULE} with --bits)",
    )
    parser.add_argument(
        "--align",
        action=argparse.BooleanOptionalAction,
        help="reorder one mate's neurons to match the other's before merging (default: as for --rule; never with "
        "paper)",
    )
    parser.add_argument(
        "--tau",
        type=float,
        help="for the rule paper alone: the largest relative difference of magnitudes that are shared "
        f"(default: {DEFAULT_TAU})",
    )


def _add_pairing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pairing",
        choices=PAIRINGS,
        help="mates drawn at random, of least estimated loss, or that fire on the same tokens "
        f"(default: {DEFAULT_PAIRING})",
    )
    parser.add_argument(
        "--compression",
        type=float,
        metavar="PERCENT",
        help="how much smaller the experts become, 0 to 50, spent where it is estimated to cost least "
        f"(default: {DEFAULT_COMPRESSION:g})",
    )
    parser.add_argument(
        "--max-expert-parallel",
        type=int,
        metavar="N",
        help="keep mates on one rank for up to N expert-parallel ranks (default: the largest power of two up to 8 "
        "that leaves each rank an even number of experts, at least 4)",
    )
    parser.add_argument(
        "--seed", type=int, default=DEFAULT_SEED, help="seed of the random pairing (default: %(default)s)"
    )


def _add_codes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bits",
        type=float,
        metavar="B",
        help="make codes of B bits a weight, 2 to 4, in place of pairs: a budget that is spent where it is estimated "
        "to gain most, unless B is 2, 2.5, 3 or 4 and there is --even or no calibration text",
    )
    parser.add_argument(
        "--even",
        action="store_true",
        help="with --bits: codes of one width for all experts of a layer, as expert-parallel load balancing needs "
        "them, and of all layers where B is 2, 2.5, 3 or 4",
    )


def _add_running(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default=DEFAULT_DEVICE, metavar="cpu|cuda", help="where to compute (default: %(default)s)"
    )
    parser.add_argument(
        "--shard-size",
        type=_size,
        default=DEFAULT_SHARD_SIZE,
        metavar="SIZE",
        help=f"largest size of a file, as 500MB; no file holds two layers (default: {DEFAULT_SHARD_SIZE // 10**9}GB)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=DEFAULT_JOBS,
        metavar="N",
        help="merge N layers at once, each in a process of its own (default: %(default)s)",
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="merge them on this Ray cluster, which shares the file system ('auto': the one of this machine)",
    )
    parser.add_argument("--resume", action="store_true", help="resume an interrupted conversion to DEST")


def _size(text: str) -> int:
    """Bytes, from a number with a unit of 1000s."""
    number = text.upper().removesuffix("B")
    factor = {"K": 10**3, "M": 10**6, "G": 10**9}.get(number[-1:])
    try:
        return int(float(number[:-1]) * factor) if factor else int(number)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it as 5GB or 500MB") from None


def convert(arguments: argparse.Namespace) -> None:
    from vllm_puzzle.offline.conversion.convert import convert as convert_checkpoint
    from vllm_puzzle.offline.conversion.options import ConvertOptions

    options = ConvertOptions(
        calibration=None if arguments.calibration == "none" else Path(arguments.calibration),
        calibration_sequences=arguments.calibration_sequences,
        rule=arguments.rule,
        tau=arguments.tau,
        align=arguments.align,
        pairing=arguments.pairing,
        compression=arguments.compression,
        bits=arguments.bits,
        even=arguments.even,
        max_expert_parallel=arguments.max_expert_parallel,
        seed=arguments.seed,
        device=arguments.device,
        shard_size=arguments.shard_size,
        jobs=arguments.jobs,
        ray=arguments.ray,
    )
    with progress_bar("converting") as progress:
        result = convert_checkpoint(arguments.source, arguments.destination, options, say, progress, arguments.resume)
    tell(
        arguments,
        asdict(result),
        f"{arguments.destination}: experts {size(result.expert_bytes_before)} -> {size(result.expert_bytes_after)}, "
        f"checkpoint {size(result.checkpoint_bytes_before)} -> {size(result.checkpoint_bytes_after)}, "
        f"relative error of {'merged' if arguments.bits is None else 'coded'} weights {result.relative_error:.4f}",
    )


def add_unpack(parser: argparse.ArgumentParser) -> None:
    parser.description = "Writes a packed checkpoint back as a plain BF16 checkpoint."
    parser.add_argument("packed", type=given_path, metavar="PACKED", help="what the converter wrote")
    parser.add_argument("destination", type=given_path, metavar="DEST", help="folder to write; must not exist")
    add_json(parser, path="destination")
    parser.set_defaults(interrupted="nothing was written; unpacking starts from the beginning")


def unpack(arguments: argparse.Namespace) -> None:
    from vllm_puzzle.offline.unpack import unpack_checkpoint

    with progress_bar("unpacking") as progress:
        result = unpack_checkpoint(arguments.packed, arguments.destination, progress)
    tell(
        arguments,
        asdict(result),
        f"{arguments.destination}: every expert in BF16, in the layout of the hub, checkpoint "
        f"{size(result.checkpoint_bytes_before)} -> {size(result.checkpoint_bytes_after)}",
    )
