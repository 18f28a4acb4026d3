"""What the kernels are compiled for."""

from dataclasses import dataclass
from functools import cache

import torch
import triton

from ..errors import EngineError

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter on the CPU ($TRITON_INTERPRET=1 when Triton is first imported)."""


@dataclass(frozen=True)
class Target:
    """
    Attributes:
        family: sm80, sm89, sm90, sm100 or gfx942: whose defaults are taken.
        device_name: as the driver gives it.
        num_sms: streaming multiprocessors, or compute units.
        ptx: whether inline PTX is understood.
    """

    family: str
    device_name: str
    num_sms: int
    ptx: bool


@cache
def current_target(device: torch.device) -> Target:
    """The target of a device; asks the driver, never the device.

    Raises:
        EngineError: nothing here can run the kernels.
    """
    if device.type == "cpu" and INTERPRETED:
        return Target(family="sm90", device_name="interpreter", num_sms=4, ptx=False)
    if device.type != "cuda":
        raise EngineError(
            f"the triton engine computes on CUDA and ROCm devices, not on {device.type}; choose "
            f"VLLM_PUZZLE_ENGINE=auto or reference"
        )
    if not torch.cuda.is_available():
        raise EngineError(
            f"the triton engine needs a CUDA or ROCm device and torch {torch.__version__} sees none; choose "
            f"VLLM_PUZZLE_ENGINE=auto or reference"
        )
    properties = torch.cuda.get_device_properties(device)
    name, num_sms = properties.name, properties.multi_processor_count
    if torch.version.hip is not None:
        return Target(family="gfx942", device_name=name, num_sms=num_sms, ptx=False)
    capability = properties.major * 10 + properties.minor
    if capability < 80:
        raise EngineError(
            f"the triton engine needs BF16 tensor cores (compute capability 8.0), {properties.name} has "
            f"{properties.major}.{properties.minor}; choose VLLM_PUZZLE_ENGINE=reference"
        )
    # 8.6, 8.9 and 12 multiply as 8.0 does but have 99 KB of shared memory instead of 163; 11 is a smaller 10.
    families = {80: "sm80", 87: "sm80", 90: "sm90"} | dict.fromkeys((100, 101, 103, 110), "sm100")
    family = families.get(capability, "sm89")
    return Target(family=family, device_name=name, num_sms=num_sms, ptx=True)
