"""Hold rows of the quality benchmark against what coded experts are to reach.

    python -m benchmarks.quality.bars rows.json...

A bar whose rows are not all there is said to be missing. Fails where one is missed.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

Rows = Mapping[tuple[str, str], Mapping[str, Any]]
"""Rows of `benchmarks.quality` by model and method."""

PAIRS = "packed, compensated, aligned"


class Bar(NamedTuple):
    """A figure of one row over the same of another, and the most that it may be."""

    model: str
    figure: str
    method: str
    peer: str
    most: float


def bars() -> Iterator[Bar]:
    """What is asked."""
    for bits, integers, levels in ((2, 0.72, 0.90), (2.5, None, 0.85), (3, 0.74, 0.89), (4, 0.76, 0.90)):
        alone = f"codes, {bits} bits, layer by layer"
        if integers is not None:
            yield Bar("sparse", "output_error", alone, f"GPTQ INT{bits}", integers)
        yield Bar("sparse", "output_error", alone, f"fitted levels, {bits} bits", levels)
    for model in ("sparse", "all-active"):
        for figure in ("kl_with_source_routing", "kl_divergence", "perplexity"):
            yield Bar(model, figure, "codes, 3 bits", PAIRS, 1.0)
        yield Bar(f"{model}-rotated", "kl_divergence", "codes, 4 bits, even", "GPTQ INT4 asymmetric", 1.0)
    yield Bar("sparse", "kl_with_source_routing", "codes, 2.5 bits", "codes, 2.5 bits, even", 0.7)
    yield Bar("sparse-skewed", "output_error", "codes, 2.5 bits by expert", "codes, 2.5 bits by layer", 0.8)


def read_rows(paths: list[Path]) -> Rows:
    """The rows of several files; of one model and method the last one, and of packed pairs those at 8 bits."""
    rows: dict[tuple[str, str], Mapping[str, Any]] = {}
    for path in paths:
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            if row["method"] != PAIRS or row["bits_per_expert_weight"] == 8:
                rows[row["model"], row["method"]] = row
    return rows


def judge(bar: Bar, rows: Rows) -> tuple[str, bool]:
    """A line of the table, and whether the bar is met; one that cannot be judged counts as met."""
    what = f"{bar.model}: {bar.figure} of {bar.method} over {bar.peer}"
    mine, peers = rows.get((bar.model, bar.method)), rows.get((bar.model, bar.peer))
    if mine is None or peers is None:
        return f"{what}: missing", True
    ratio = mine[bar.figure] / peers[bar.figure]
    met = ratio <= bar.most
    figures = f"{mine[bar.figure]:.4g} / {peers[bar.figure]:.4g} = {ratio:.3f}"
    return f"{what}: {figures}, at most {bar.most:g}: {'met' if met else 'MISSED'}", met


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.bars", description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="+", type=Path, metavar="FILE", help="what --json of benchmarks.quality wrote")
    rows = read_rows(parser.parse_args(argv).rows)
    judged = [judge(bar, rows) for bar in bars()]
    for line, _ in judged:
        print(line)
    return 0 if all(met for _, met in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
