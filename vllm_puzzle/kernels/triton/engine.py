"""The Triton engine as the registry knows it. Triton need not be installed, and is imported when it is first used."""

from dataclasses import dataclass

import torch

from ..checks import check_call, misfit
from ..engine import Arguments, Engine
from ..errors import EngineError

TRITON = "triton"


@dataclass(frozen=True)
class TritonEngine(Engine):
    """CUDA and ROCm devices; a CPU only in Triton's interpreter, where $VLLM_PUZZLE_ENGINE asks for it."""

    name = family = TRITON
    dtypes = (torch.bfloat16, torch.float16)

    def suits(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def choose(self, device: torch.device, dtype: torch.dtype) -> Engine:
        try:
            from .target import current_target
        except ModuleNotFoundError as error:
            raise EngineError(
                f"the triton engine needs {error.name}, which is not installed; install the triton that this torch "
                f"({torch.__version__}) was built for, or choose VLLM_PUZZLE_ENGINE=reference"
            ) from None
        current_target(device)
        if dtype not in self.dtypes:
            name = str(dtype).removeprefix("torch.")
            raise EngineError(
                f"the triton engine computes in bfloat16 and float16 and the model runs in {name}; serve with --dtype "
                f"bfloat16, or choose VLLM_PUZZLE_ENGINE=reference"
            )
        return self

    def check(self, words: torch.Tensor, dtype: torch.dtype) -> int | None:
        from .moe import find_undecodable_slot

        return find_undecodable_slot(words, dtype)

    def run(self, *arguments: *Arguments) -> torch.Tensor:
        check_call(self, *arguments)
        from .moe import fits_triton, triton_moe

        tensors = arguments[:6]
        if not fits_triton(*tensors):
            raise misfit(self, *tensors)
        return triton_moe(*arguments)


TRITON_ENGINE = TritonEngine()
