"""The stage that compiles, beside the others, what they launch."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpu_session.workload import Task, Workload, tasks
from vllm_puzzle.tuning.compiling import CompilePool
from vllm_puzzle.tuning.gpu import Gpu

Say = Callable[..., None]


def compile_all(
    workload: Workload, gpu: Gpu, peer: str, jobs: int | None, stages: Sequence[str], most: int | None, say: Say
) -> None:
    """Says how many tasks each stage has, and each that is done.

    Args:
        peer: the folder with vLLM's fused_moe, or nothing.
        stages: whose tasks; `times` are those of all shapes.
        most: tasks for a stage; None, all.
    """
    wanted: dict[str, list[Task]] = {}
    for task in tasks(workload, gpu, bool(peer)):
        if task.stage.split()[0] in stages:
            wanted.setdefault(task.stage, []).append(task)
    kept = [task for group in wanted.values() for task in group[:most]]
    for stage, group in wanted.items():
        say(what="to compile", stage=stage, count=len(group[:most]))
    with CompilePool(gpu, jobs, [peer] if peer else []) as pool:
        begin, done = time.monotonic(), 0
        for result in pool.run(_call, [(task.function, task.arguments) for task in kept]):
            task, done = kept[result.index], done + 1
            failed = {} if result.failure is None else {"failure": result.failure, "task": repr(task.arguments)[:500]}
            say(what="compiled", stage=task.stage, seconds=result.seconds, **failed)
        say(what="compiling", done=done, of=len(kept), seconds=round(time.monotonic() - begin, 1))


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    function(*arguments)
