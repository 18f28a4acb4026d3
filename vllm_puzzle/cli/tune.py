"""The command that measures: `vllm-puzzle tune`."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_puzzle.cli.output import add_json, say, tell
from vllm_puzzle.cli.paths import given_path

if TYPE_CHECKING:
    from vllm_puzzle.tuning.search import Found
    from vllm_puzzle.tuning.shape import LayerShape

_SIZES = ("num_experts", "top_k", "hidden_size", "intermediate_size")
_FOLDER = "VLLM_TUNED_CONFIG_FOLDER"


def add_tune(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Finds the Triton engine's fastest tiles for a model on the GPU of this machine, and saves them where the "
        "engine looks."
    )
    parser.add_argument(
        "packed", type=given_path, nargs="?", metavar="PACKED", help="what the converter wrote; or give the four sizes"
    )
    for name in _SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=_positive, metavar="N", help="as in config.json")
    parser.add_argument(
        "--tensor-parallel",
        type=_positive,
        default=1,
        metavar="N",
        help="ranks that share an expert (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16"), help="dtype of activations (default: the checkpoint's, or bfloat16)"
    )
    parser.add_argument(
        "--tokens",
        type=_positive,
        nargs="+",
        metavar="N",
        help="numbers of tokens in a call, tuned in this order (default: powers of two up to 4096)",
    )
    parser.add_argument(
        "--seconds", type=_positive, default=900, metavar="N", help="stop after about N seconds (default: %(default)s)"
    )
    parser.add_argument(
        "--jobs",
        type=_positive,
        metavar="N",
        help="processes that compile (default: one per core but one)",
    )
    parser.add_argument(
        "--output",
        type=given_path,
        metavar="FOLDER",
        help=f"folder to write the file to (default: ${_FOLDER}, or else the current folder)",
    )
    add_json(parser, path="packed")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return int(text)


def tune(arguments: argparse.Namespace) -> None:
    """
    Raises:
        CheckpointError: the checkpoint, or the sizes, are not what can be tuned for; there is no card, or it cannot run
            the kernels; or some tiles computed something wrong.
    """
    from vllm_puzzle.format import FormatError
    from vllm_puzzle.kernels.errors import EngineError
    from vllm_puzzle.offline.errors import CheckpointError

    try:
        _tune(arguments)
    except (EngineError, FormatError) as error:
        raise CheckpointError(str(error)) from None


def _tune(arguments: argparse.Namespace) -> None:
    import torch

    from vllm_puzzle.kernels.errors import EngineError

    shape, dtype = _shape(arguments)
    if not torch.cuda.is_available():
        raise EngineError(
            f"tune measures on a CUDA or ROCm card, and torch {torch.__version__} finds none here; run it on the "
            f"machine that will serve"
        )
    try:
        from vllm_puzzle.tuning.card import Card
        from vllm_puzzle.tuning.tuner import NUM_TOKENS, TuneRequest
        from vllm_puzzle.tuning.tuner import tune as find_tiles
    except ModuleNotFoundError as error:
        raise EngineError(
            f"tune needs {error.name}, which is not installed; install the triton that this torch "
            f"({torch.__version__}) was built for"
        ) from None
    torch.manual_seed(0)
    wanted = os.environ.get(_FOLDER)
    folder = arguments.output or Path(wanted or ".")
    all_tokens = list(dict.fromkeys(arguments.tokens or NUM_TOKENS))
    try:
        request = TuneRequest(shape, all_tokens, dtype, arguments.seconds)
        tuned = find_tiles(Card(), request, folder, arguments.jobs, _report)
    except OSError as error:
        raise EngineError(f"{folder} cannot be written: {error.strerror or error}; give another --output") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what was reported is saved in {folder}") from None
    missing = [tokens for tokens in all_tokens if tokens not in tuned.found]
    lines = [f"{tuned.path}: the fastest tiles for {len(tuned.found)} of {len(all_tokens)} numbers of tokens"]
    if missing:
        lines.append(
            f"There was no time for {', '.join(map(str, missing))} tokens: give them as --tokens, or more --seconds."
        )
    if not wanted or Path(wanted).resolve() != folder.resolve():
        lines.append(f"Serve with {_FOLDER}={folder.resolve()}, or the engine will not find it.")
    found = [
        {"tokens": tokens, "us": found.us, "us_before": found.us_before, "config": found.config.model_dump()}
        for tokens, found in tuned.found.items()
    ]
    tell(arguments, {"file": str(tuned.path), "found": found, "missing": missing}, "\n".join(lines))
    wrong = [sentence for found in tuned.found.values() for sentence in found.wrong]
    if wrong:
        raise EngineError(
            f"{len(wrong)} configurations computed something else than the reference engine and are in no file, the "
            f"first: {wrong[0]}; please report it"
        )


def _shape(arguments: argparse.Namespace) -> "tuple[LayerShape, str]":
    """The shape of one rank, and the dtype of activations."""
    from vllm_puzzle.format import FormatError
    from vllm_puzzle.tuning.shape import LayerShape, read_shape

    sizes = {name: getattr(arguments, name) for name in _SIZES}
    given = [name for name, size in sizes.items() if size is not None]
    if arguments.packed is not None and given:
        raise FormatError(
            f"{arguments.packed} says what its sizes are; leave out --{given[0].replace('_', '-')}, or the checkpoint"
        )
    if arguments.packed is not None:
        shape, dtype = read_shape(arguments.packed)
    elif len(given) == len(_SIZES):
        shape, dtype = LayerShape("", **sizes), "bfloat16"
    else:
        missing = [f"--{name.replace('_', '-')}" for name in _SIZES if name not in given]
        raise FormatError(f"nothing says what to tune for; give a packed checkpoint, or {', '.join(missing)} too")
    if shape.top_k > shape.num_experts:
        raise FormatError(f"a token cannot have {shape.top_k} of {shape.num_experts} experts; correct --top-k")
    part, rest = divmod(shape.intermediate_size, arguments.tensor_parallel)
    if rest:
        raise FormatError(
            f"--tensor-parallel {arguments.tensor_parallel} does not divide the intermediate size "
            f"{shape.intermediate_size}; give as many ranks as will serve"
        )
    rank = LayerShape(shape.name, shape.num_experts, shape.hidden_size, part, shape.top_k)
    return rank, arguments.dtype or dtype


def _report(num_tokens: int, found: "Found") -> None:
    say(
        f"{num_tokens:>5} tokens: {found.us:.1f} us, default {found.us_before:.1f} us, {found.num_measured} "
        f"configurations measured, {found.num_failed} did not run{'' if found.finished else ', out of time'}"
    )
