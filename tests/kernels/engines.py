"""The engines that a test can run here, as parameters of tests."""

import pytest
import torch

from vllm_puzzle.kernels import REFERENCE, TRITON
from vllm_puzzle.kernels.cpu import usable_isas
from vllm_puzzle.kernels.cpu.library import LIBRARY_PATH
from vllm_puzzle.kernels.triton import INTERPRETED

# In the interpreter, or compiled on a GPU.
TRITON_MARKS = () if INTERPRETED else (pytest.mark.gpu,)
# The library may not be built where only a card is of interest; test_cpu.py fails there and says why.
CPU_ENGINES = [f"cpu-{isa.name.lower()}" for isa in usable_isas()] if LIBRARY_PATH.exists() else []
ON_CPU = [REFERENCE, *CPU_ENGINES]
HERE = [*ON_CPU, pytest.param(TRITON, marks=TRITON_MARKS)]
# Which engines compute a dtype: see `choose_engine`.
CPU_DTYPES = [(engine, torch.bfloat16) for engine in ON_CPU] + [
    (engine, dtype) for engine in (REFERENCE, *CPU_ENGINES[:1]) for dtype in (torch.float16, torch.float32)
]
DTYPES = CPU_DTYPES + [pytest.param(TRITON, dtype, marks=TRITON_MARKS) for dtype in (torch.bfloat16, torch.float16)]
