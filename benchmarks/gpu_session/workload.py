"""What the stages launch, in one place: from it they run, and from it everything is compiled before they do."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

from benchmarks.shapes import DEEPSEEK_V3_QUARTER, MIXTRAL_8X7B, QWEN3_30B_A3B
from vllm_puzzle.tuning.gpu import Gpu
from vllm_puzzle.tuning.shape import LayerShape

DTYPES = ("bfloat16", "float16")
# Candidates of a search that are compiled before it begins, for each number of tokens.
AHEAD = 40


class Cut(NamedTuple):
    """A configuration to check: one of the defaults, as it is or with its sums in parts."""

    key: int
    split_k: int
    config: dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """
    Attributes:
        shapes: to be timed; the first is tuned.
        checked: to be compared with the reference engine; the first in both dtypes and with split sums too.
        checked_tokens, graph_tokens, timed_tokens, tuned_tokens: numbers of tokens in a call.
        watched_tokens: through one chunk of the sort, and through two.
        keys: how many of a family's defaults are checked, the last ones; None, all.
        most_block: of rows, k and tokens; None leaves the defaults as they are.
    """

    shapes: tuple[LayerShape, ...]
    checked: tuple[LayerShape, ...]
    checked_tokens: tuple[int, ...]
    graph_tokens: tuple[int, ...]
    timed_tokens: tuple[int, ...]
    tuned_tokens: tuple[int, ...]
    watched_tokens: tuple[int, ...]
    keys: int | None = None
    most_block: int | None = None

    def cuts(self, family: str, shape: LayerShape) -> Iterator[Cut]:
        """The defaults of a family of GPUs, for one of the checked shapes."""
        from vllm_puzzle.kernels.triton.configs import FOLDER, load_configs

        defaults = list(load_configs(FOLDER / f"{family}.json").items())
        for key, config in defaults if self.keys is None else defaults[-self.keys :]:
            for split_k in (1, 2) if shape == self.checked[0] else (1,):
                fields = config.model_dump()
                for part in (fields["gate_up"], fields["down"]):
                    part["split_k"] = split_k
                    if self.most_block:
                        part |= {name: min(part[name], self.most_block) for name in ("block_rows", "block_k")}
                if self.most_block:
                    fields["block_tokens"] = min(fields["block_tokens"], self.most_block)
                yield Cut(key, split_k, fields)

    def dtypes(self, shape: LayerShape) -> tuple[str, ...]:
        """The dtypes of activations for one of the checked shapes."""
        return DTYPES if shape == self.checked[0] else DTYPES[:1]


def checked_slots(shape: LayerShape) -> int:
    """How many slots the experts of a checked shape have: one pair less than there could be."""
    return shape.num_experts - pairs(shape)


def pairs(shape: LayerShape) -> int:
    return shape.num_experts // 2 - 1


REAL = Workload(
    shapes=(QWEN3_30B_A3B, MIXTRAL_8X7B, DEEPSEEK_V3_QUARTER),
    checked=(
        LayerShape("even", num_experts=16, hidden_size=1024, intermediate_size=768, top_k=4),
        # No size is a multiple of a tile; rows of the second are not aligned to 16 bytes.
        LayerShape("tails", num_experts=6, hidden_size=1048, intermediate_size=392, top_k=2),
        LayerShape("unaligned", num_experts=6, hidden_size=1001, intermediate_size=333, top_k=2),
    ),
    checked_tokens=(0, 1, 2, 7, 8, 33, 64, 300, 1024),
    graph_tokens=(1, 7, 64, 400),
    timed_tokens=(1, 4, 16, 32, 64, 128, 256, 1024, 4096),
    tuned_tokens=(16, 1, 64, 1024, 256, 4096),
    watched_tokens=(16, 600),
)
FAKE = Workload(
    shapes=(LayerShape("tiny", num_experts=4, hidden_size=64, intermediate_size=32, top_k=2),),
    checked=(
        LayerShape("even", num_experts=6, hidden_size=48, intermediate_size=32, top_k=2),
        LayerShape("unaligned", num_experts=6, hidden_size=41, intermediate_size=27, top_k=2),
    ),
    checked_tokens=(0, 9),
    graph_tokens=(7,),
    timed_tokens=(1,),
    tuned_tokens=(1,),
    watched_tokens=(3,),
    keys=2,
    most_block=64,
)


class Task(NamedTuple):
    """Something to compile: for which stage, and the call of one of the functions below in a worker."""

    stage: str
    function: Any
    arguments: tuple[Any, ...]


def tasks(workload: Workload, gpu: Gpu, peer: bool) -> Iterator[Task]:
    """All that the stages launch, in their order; of a search, what it would try from the default."""
    from vllm_puzzle.tuning.compiling import compile_call

    for shape in workload.checked:
        slots = checked_slots(shape)
        for dtype in workload.dtypes(shape):
            for cut in workload.cuts(gpu.family, shape):
                common = (gpu, shape, workload.checked_tokens, dtype, cut.config)
                yield Task("correct", compile_call, (*common, "int32", slots))
                if dtype == DTYPES[0]:
                    yield Task("correct", compile_call, (*common, "int64", slots))
    yield Task("graphs", compile_call, (gpu, workload.checked[0], workload.graph_tokens))
    for shape in workload.checked:
        yield Task("sanitizer", compile_call, (gpu, shape, workload.watched_tokens))
    yield Task("ncu", compile_call, (gpu, workload.shapes[0], workload.watched_tokens))
    for shape in workload.shapes:
        for num_tokens in workload.timed_tokens:
            yield Task(f"times {shape.name}", compile_call, (gpu, shape, (num_tokens,)))
            if peer:
                for fp8 in (False, True):
                    yield Task(f"times {shape.name}", compile_peer, (shape, num_tokens, fp8))
    yield from _candidates(workload, gpu)


def _candidates(workload: Workload, gpu: Gpu) -> Iterator[Task]:
    from vllm_puzzle.tuning.candidates import STEPS, candidates
    from vllm_puzzle.tuning.compiling import compile_call
    from vllm_puzzle.tuning.tuner import limits_of, start_of

    shape, columns = workload.shapes[0], []
    for num_tokens in workload.tuned_tokens:
        start, limits = start_of(gpu, shape, num_tokens), limits_of(gpu, shape, num_tokens)
        steps = [candidates(start, part, space, limits) for part, space in STEPS]
        # In turns, so that every step has had its likeliest.
        likeliest = [config for row in zip_longest(*steps) for config in row if config is not None]
        columns.append([(gpu, shape, (num_tokens,), DTYPES[0], c.model_dump()) for c in [start, *likeliest[:AHEAD]]])
    for row in zip_longest(*columns):
        yield from (Task("tune", compile_call, arguments) for arguments in row if arguments)


def compile_peer(shape: LayerShape, num_tokens: int, fp8: bool) -> None:
    """Compiles, in a worker, what a call of vLLM's fused_moe launches."""
    import torch

    from benchmarks.gpu_session.engines import fused_call

    def weights(rows: int, columns: int) -> torch.Tensor:
        one = torch.empty(1, rows, columns, dtype=torch.float8_e4m3fn if fp8 else torch.bfloat16)
        return one.expand(shape.num_experts, -1, -1)

    w13 = weights(2 * shape.intermediate_size, shape.hidden_size)
    w2 = weights(shape.hidden_size, shape.intermediate_size)
    scales = [torch.empty(w.shape[0], w.shape[1] // 128, w.shape[2] // 128) for w in (w13, w2)] if fp8 else None
    x = torch.empty(num_tokens, shape.hidden_size, dtype=torch.bfloat16)
    ids = torch.zeros(num_tokens, shape.top_k, dtype=torch.int32)
    fused_call(w13, w2, scales)(x, torch.empty(ids.shape), ids)
