"""The table as a picture: bits per expert weight against a figure of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

FIGURES = {
    "perplexity": "perplexity",
    "kl_divergence": "KL divergence",
    "kl_with_source_routing": "KL divergence, routing held",
    "output_error": "output error",
}
# Codes, packed pairs and all others.
_COLORS = {"codes": "C2", "packed": "C3", "": "C0"}
# Methods whose points a line joins.
_SERIES = ("packed, compensated, aligned", "codes, {bits:g} bits", "codes, {bits:g} bits, layer by layer")


def plot(rows: Sequence[dict[str, Any]], path: Path, title: str, figure: str) -> None:
    """Writes an image whose format follows the suffix of `path`: one panel a model, every row a point.

    Args:
        figure: one of FIGURES; rows that have none of it are left out, and those without any loss too.
    """
    shown = [row for row in rows if row[figure]]
    models = list(dict.fromkeys(row["model"] for row in shown))
    picture, panels = pyplot.subplots(1, len(models), figsize=(7 * len(models), 6), squeeze=False)
    for panel, model in zip(panels[0], models, strict=True):
        mine = [row for row in shown if row["model"] == model]
        for row in mine:
            color = next(color for prefix, color in _COLORS.items() if row["method"].startswith(prefix))
            panel.scatter(row["bits_per_expert_weight"], row[figure], color=color, zorder=3)
            panel.annotate(
                row["method"].removeprefix("packed, "),
                (row["bits_per_expert_weight"], row[figure]),
                xytext=(4, 3),
                textcoords="offset points",
                fontsize=6,
            )
        for series in _SERIES:
            methods = {series.format(bits=bits) for bits in (2, 2.5, 3, 4)} | {"uncompressed"}
            points = sorted((row["bits_per_expert_weight"], row[figure]) for row in mine if row["method"] in methods)
            if len(points) > 1:
                panel.plot(*zip(*points, strict=True), color=_COLORS[series.split(",")[0]], linewidth=0.8)
        panel.set(title=model, xlabel="bits per expert weight", ylabel=FIGURES[figure], yscale="log")
        panel.grid(alpha=0.3, which="both")
    picture.suptitle(title, fontsize=9)
    picture.tight_layout()
    picture.savefig(path)
    pyplot.close(picture)
