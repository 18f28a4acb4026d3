"""The engines that a test can run here, as parameters of tests."""

import pytest

from vllm_puzzle.kernels import ENGINES, TRITON
from vllm_puzzle.kernels.cpu import usable_isas
from vllm_puzzle.kernels.cpu.library import LIBRARY_PATH
from vllm_puzzle.kernels.triton.target import INTERPRETED

# In the interpreter, or compiled on a GPU.
TRITON_MARKS = () if INTERPRETED else (pytest.mark.gpu,)
# The library may not be built where only a card is of interest; test_cpu.py fails there and says why.
CPU_ENGINES = [f"cpu-{isa.name.lower()}" for isa in usable_isas()] if LIBRARY_PATH.exists() else []
ON_CPU = [
    name for name, engine in ENGINES.items() if name != TRITON and (engine.family != "cpu" or name in CPU_ENGINES)
]
HERE = [*ON_CPU, pytest.param(TRITON, marks=TRITON_MARKS)]
CPU_DTYPES = [(engine, dtype) for engine in ON_CPU for dtype in ENGINES[engine].dtypes]
DTYPES = CPU_DTYPES + [pytest.param(TRITON, dtype, marks=TRITON_MARKS) for dtype in ENGINES[TRITON].dtypes]
CODED = [name for name in ON_CPU if ENGINES[name].reads_codes]
CODED_CPU = [name for name in CODED if name in CPU_ENGINES]
CODED_DTYPES = [(engine, dtype) for engine, dtype in CPU_DTYPES if engine in CODED]
