"""One stage in this process: its card, its seed, and its mistakes as a line."""

import json
import traceback
from typing import Any

from benchmarks.gpu_session.plan import Options
from benchmarks.gpu_session.workload import Workload
from vllm_puzzle.tuning.gpu import Gpu

# Of what a stage compiles without a card: enough to see that it does.
FAKE_TASKS = 1


def say(**fields: Any) -> None:
    """A line for the parent."""
    print(json.dumps(fields), flush=True)


def run_stage(name: str, options: Options, about: Any, limit: float) -> int:
    """Runs a stage and returns the exit status.

    Args:
        about: of `compile`, the GPU's fields; of `times`, the shape's name.
        limit: seconds that a search may take.
    """
    try:
        if name == "compile":
            from benchmarks.gpu_session.compiling import compile_all

            most = FAKE_TASKS if options.fake else None
            peer = str(options.peer or "")
            compile_all(options.workload, Gpu(**about), peer, options.jobs, options.stages, most, say)
        else:
            _on_the_card(name, options, options.workload, about, limit)
    except Exception as error:
        say(what="broken", error=str(error)[:500], traceback=traceback.format_exc()[-3000:])
        return 1
    return 0


def _on_the_card(name: str, options: Options, workload: Workload, about: Any, limit: float) -> None:
    import torch

    from benchmarks.gpu_session.fake_card import FakeCard
    from vllm_puzzle.tuning.card import Card

    torch.manual_seed(0)
    card = FakeCard() if options.fake else Card()
    with torch.inference_mode():
        if name in ("card", "ceilings"):
            from benchmarks.gpu_session import ceilings

            (ceilings.describe if name == "card" else ceilings.measure)(card, say)
        elif name == "correct":
            from benchmarks.gpu_session.correctness import check_all

            check_all(card, workload, say)
        elif name == "graphs":
            from benchmarks.gpu_session.graphs import check_graphs

            check_graphs(card, workload, say)
        elif name == "times":
            from benchmarks.gpu_session.times import time_shape

            shape = next(shape for shape in workload.shapes if shape.name == about)
            time_shape(card, workload, shape, bool(options.peer), say)
        elif name == "tune":
            from benchmarks.gpu_session.searching import tune_first

            tune_first(card, workload, options, limit, say)
        else:
            from benchmarks.gpu_session.correctness import run_watched

            watched = workload.checked if name == "sanitizer" else workload.shapes[:1]
            run_watched(card, watched, workload.watched_tokens, say)
