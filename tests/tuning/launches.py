"""What a worker of a `CompilePool` is given to do in tests."""

import os
import sys


def die(code: int) -> None:
    os._exit(code)


def fail(sentence: str) -> None:
    raise RuntimeError(sentence)


def check_environment(path: str) -> None:
    import torch
    import triton

    assert not torch.cuda.is_available()
    assert not triton.knobs.runtime.interpret
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert path in sys.path
