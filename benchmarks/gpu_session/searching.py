"""The search for tiles, as `vllm-puzzle tune` does it, of the first shape."""

from collections.abc import Callable

from benchmarks.gpu_session.plan import Options
from benchmarks.gpu_session.workload import DTYPES, Workload
from vllm_puzzle.tuning.card import Card
from vllm_puzzle.tuning.search import Found
from vllm_puzzle.tuning.tuner import TuneRequest, tune


def tune_first(card: Card, workload: Workload, options: Options, seconds: float, say: Callable[..., None]) -> None:
    """Says what was found for each number of tokens; the file goes to DIR/tiles."""

    def report(num_tokens: int, found: Found) -> None:
        say(
            what="tuned",
            tokens=num_tokens,
            us=round(found.us, 2),
            us_before=round(found.us_before, 2),
            measured=found.num_measured,
            failed=found.num_failed,
            finished=found.finished,
            config=found.config.model_dump(),
            wrong=found.wrong[:5],
            ok=not found.wrong,
        )

    folder, shape = options.out / "tiles", workload.shapes[0]
    on_a_card = card.device.type == "cuda"
    request = TuneRequest(shape, workload.tuned_tokens, DTYPES[0], seconds)
    tuned = tune(card, request, folder, options.jobs, report, compile_ahead=on_a_card)
    say(what="tiles", shape=shape.name, file=tuned.path.name, tokens=list(tuned.found))
