"""Units written by the tasks of a Ray cluster that shares this machine's file system."""

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from ..errors import CheckpointError

# A task whose worker or machine is lost starts again; one that raises does not.
_RESTARTS = 3


class RayPool:
    """Submits calls to the cluster at `address`, as tasks of `threads` CPUs each, while the context lasts.

    Raises:
        CheckpointError: ray is not installed, or no cluster is there.
    """

    def __init__(self, address: str, threads: int) -> None:
        self._address = address
        self._threads = threads
        self._ray: Any = None

    def __enter__(self) -> "RayPool":
        try:
            import ray
        except ImportError:
            raise CheckpointError("--ray needs Ray: pip install 'vllm-puzzle[ray]'") from None
        try:
            ray.init(address=self._address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(f"--ray {self._address}: no cluster can be reached there ({reason})") from None
        self._ray = ray
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ray.shutdown()

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> "RayResult":
        """Starts a call in a task of its own."""
        task = self._ray.remote(num_cpus=self._threads, max_retries=_RESTARTS)(_call)
        return RayResult(self._ray, task.remote(self._threads, function, arguments))


class RayResult:
    """The result of a call that a task makes."""

    def __init__(self, ray: Any, reference: Any) -> None:
        self._ray = ray
        self._reference = reference

    def result(self) -> Any:
        """Waits for the call's result; raises what it raised, or OSError where its task was lost for good."""
        try:
            return self._ray.get(self._reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.RayError as error:
            raise OSError(f"Ray lost a layer ({str(error).strip().splitlines()[0]})") from None

    def cancel(self) -> None:
        """Stops the call without waiting for it."""
        self._ray.cancel(self._reference)


def _call(threads: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(threads)
    return function(*arguments)
