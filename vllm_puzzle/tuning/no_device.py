"""A Triton driver without a device: kernels are compiled as they are launched, and launched nowhere."""

from collections.abc import Callable
from typing import Any

from triton.backends.compiler import GPUTarget

from .gpu import Gpu

_MOST_THREADS = 1024


class NoDevice:
    """What `triton.runtime.driver.set_active` takes, for a GPU that need not be here.

    A launch compiles into Triton's cache what the same launch would on the card, and raises as it would there where a
    kernel needs more shared memory than a program can have.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        # Triton asks `utils` for what other drivers do through a library.
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(self._gpu.backend, self._gpu.arch, self._gpu.warp_size)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self._gpu.shared_memory, "multiprocessor_count": self._gpu.num_sms}

    def load_binary(self, *_: object) -> tuple[object, object, int, int, int]:
        """Module, function, registers, spills and the most threads of a program, of which the last is read."""
        return self, self, 0, 0, _MOST_THREADS

    def launcher_cls(self, *_: object) -> Callable[..., Any]:
        return lambda *arguments, **options: None
