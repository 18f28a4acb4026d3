"""The commands that only read: `vllm-puzzle verify | plan | inspect`."""

import argparse
from dataclasses import asdict

from vllm_puzzle.cli.output import add_json, progress_bar, tell
from vllm_puzzle.cli.paths import given_path, given_text
from vllm_puzzle.offline.defaults import DEFAULT_COMPRESSION


def add_verify(parser: argparse.ArgumentParser) -> None:
    parser.description = "Checks a packed checkpoint against its source, tensor by tensor."
    parser.add_argument("source", type=given_path, metavar="SOURCE", help="the checkpoint that was converted")
    parser.add_argument("packed", type=given_path, metavar="PACKED", help="what the converter wrote")
    add_json(parser, path="packed")
    parser.set_defaults(interrupted="not every tensor was compared, and nothing was changed")


def verify(arguments: argparse.Namespace) -> None:
    from vllm_puzzle.offline.verify import verify as verify_checkpoint

    with progress_bar("verifying") as progress:
        result = verify_checkpoint(arguments.source, arguments.packed, progress)
    tell(
        arguments,
        asdict(result),
        f"{arguments.packed}: {result.untouched} tensors equal to the source's bit for bit, {result.packed} packed "
        f"tensors within their rule",
    )


def add_plan(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Says what packing would make of a model's size and which graphics cards would hold it, "
        "from its config and its safetensors headers or index alone."
    )
    parser.add_argument(
        "model", type=given_text, metavar="MODEL", help="folder of a Hugging Face checkpoint, or a hub id like org/name"
    )
    parser.add_argument(
        "--compression",
        type=float,
        metavar="PERCENT",
        help=f"the --compression of convert (default: {DEFAULT_COMPRESSION:g})",
    )
    parser.add_argument("--bits", type=float, metavar="B", help="the --bits of convert, in place of pairs")
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="number of tokens of a sequence that must fit (default: the model's longest)",
    )
    parser.add_argument(
        "--gpu-memory-utilization",
        type=float,
        default=0.9,
        metavar="SHARE",
        help="share of a card's memory that vLLM may use, as for `vllm serve` (default: %(default)g)",
    )
    add_json(parser, path="model")


def plan(arguments: argparse.Namespace) -> None:
    import torch

    from vllm_puzzle.offline.conversion.estimate import Speed
    from vllm_puzzle.offline.conversion.options import ConvertOptions
    from vllm_puzzle.offline.reports.model_sizes import read_model_sizes
    from vllm_puzzle.offline.reports.sizing import size_model
    from vllm_puzzle.offline.reports.sizing_report import describe_sizing

    sizing = size_model(
        read_model_sizes(arguments.model),
        ConvertOptions(compression=arguments.compression, bits=arguments.bits),
        arguments.context,
        arguments.gpu_memory_utilization,
        Speed.measure(torch.device("cpu")),
    )
    tell(arguments, sizing.model_dump(mode="json"), describe_sizing(sizing))


def add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.description = "Shows how a packed checkpoint was made and what its words hold, layer by layer."
    parser.add_argument("packed", type=given_path, metavar="PACKED", help="what the converter wrote")
    parser.add_argument(
        "--html", type=given_path, metavar="FILE", help="also write one page with plots; FILE must not exist"
    )
    add_json(parser, path="packed")


def inspect(arguments: argparse.Namespace) -> None:
    from vllm_puzzle.offline.reports.inspection import inspect_checkpoint
    from vllm_puzzle.offline.reports.inspection_page import check_free, write_page
    from vllm_puzzle.offline.reports.inspection_report import describe_inspection

    if arguments.html is not None:
        # Before everything is read, which may take minutes.
        check_free(arguments.html)
    with progress_bar("inspecting") as progress:
        inspection = inspect_checkpoint(arguments.packed, progress)
    if arguments.html is not None:
        write_page(inspection, arguments.html)
    tell(arguments, inspection.model_dump(mode="json"), describe_inspection(inspection))
