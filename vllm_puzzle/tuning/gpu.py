"""What a GPU is, in plain values that can be passed to processes that do not see it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from vllm_puzzle.kernels.triton.target import Target


@dataclass(frozen=True)
class Gpu:
    """
    Attributes:
        family, device_name, num_sms, ptx: see `vllm_puzzle.kernels.triton.target.Target`.
        backend, arch: as Triton names what it compiles for, `cuda` and 90, or `hip` and `gfx942`.
        warp_size: threads of a warp.
        shared_memory: the most bytes of it that one program can have.
    """

    family: str
    device_name: str
    num_sms: int
    ptx: bool
    backend: str
    arch: int | str
    warp_size: int
    shared_memory: int

    @property
    def target(self) -> "Target":
        from vllm_puzzle.kernels.triton.target import Target

        return Target(self.family, self.device_name, self.num_sms, self.ptx)


HOPPER = Gpu("sm90", "none", 132, True, "cuda", 90, 32, 227 * 1024)
"""An H100 that is not here."""


def gpu_of(device: "torch.device") -> Gpu:
    """The GPU that `device` is; in Triton's interpreter, the one that it imitates.

    Raises:
        EngineError: nothing here can run the kernels.
    """
    from vllm_puzzle.kernels.triton.target import INTERPRETED, current_target

    target = current_target(device)
    plain = (target.family, target.device_name, target.num_sms, target.ptx)
    if INTERPRETED:
        return Gpu(*plain, HOPPER.backend, HOPPER.arch, HOPPER.warp_size, HOPPER.shared_memory)
    import torch
    from triton.compiler.compiler import max_shared_mem
    from triton.runtime import driver

    gpu = driver.active.get_current_target()
    return Gpu(*plain, gpu.backend, gpu.arch, gpu.warp_size, max_shared_mem(torch.cuda.current_device()))
