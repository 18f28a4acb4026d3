"""The commands that read and tell and change nothing: `vllm-puzzle plan | inspect`."""

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

ProgressBar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


def add_plan(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Says what packing would make of a model's size and which graphics cards would hold it, "
        "from its config and its safetensors headers or index alone."
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a Hugging Face checkpoint, or a hub id like org/name")
    parser.add_argument(
        "--compression", type=float, default=50.0, metavar="PERCENT", help="as of convert (default: %(default)g)"
    )
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens of a sequence that must fit (default: the model's longest)"
    )
    parser.add_argument(
        "--gpu-memory-utilization",
        type=float,
        default=0.9,
        metavar="SHARE",
        help="of a card's memory that vLLM may use, as of `vllm serve` (default: %(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def plan(arguments: argparse.Namespace) -> None:
    # Imported here and not above, as everywhere in the command line: torch and transformers take seconds.
    import torch

    from vllm_puzzle.offline.estimate import measure_speed
    from vllm_puzzle.offline.model_sizes import read_model_sizes
    from vllm_puzzle.offline.sizing import size_up
    from vllm_puzzle.offline.sizing_report import describe_sizing

    sizing = size_up(
        read_model_sizes(arguments.model),
        arguments.compression,
        arguments.context,
        arguments.gpu_memory_utilization,
        measure_speed(torch.device("cpu")),
    )
    print(sizing.model_dump_json(indent=2) if arguments.json else describe_sizing(sizing))


def add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.description = "Shows how a packed checkpoint was made and what its words hold, layer by layer."
    parser.add_argument("packed", type=Path, metavar="PACKED", help="what the converter wrote")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write one page with plots; FILE must not exist")


def inspect(arguments: argparse.Namespace, progress_bar: ProgressBar) -> None:
    from vllm_puzzle.offline.inspection import inspect_checkpoint
    from vllm_puzzle.offline.inspection_page import check_free, write_page
    from vllm_puzzle.offline.inspection_report import describe_inspection

    if arguments.html is not None:
        # Before everything is read, which may take minutes.
        check_free(arguments.html)
    with progress_bar("inspecting") as progress:
        inspection = inspect_checkpoint(arguments.packed, progress)
    if arguments.html is not None:
        write_page(inspection, arguments.html)
    print(inspection.model_dump_json(indent=2) if arguments.json else describe_inspection(inspection))
