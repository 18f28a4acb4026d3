"""The table as a picture: bits per expert weight against perplexity."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot


def plot(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Writes an image whose format follows the suffix of `path`: one panel a model, every row a point."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = pyplot.subplots(1, len(models), figsize=(7 * len(models), 6), squeeze=False)
    for panel, model in zip(panels[0], models, strict=True):
        mine = [row for row in rows if row["model"] == model]
        for row in mine:
            packed = row["method"].startswith("packed")
            panel.scatter(row["bits_per_expert_weight"], row["perplexity"], color="C3" if packed else "C0", zorder=3)
            panel.annotate(
                row["method"].removeprefix("packed, "),
                (row["bits_per_expert_weight"], row["perplexity"]),
                xytext=(4, 3),
                textcoords="offset points",
                fontsize=6,
            )
        best = sorted(
            (row["bits_per_expert_weight"], row["perplexity"])
            for row in mine
            if row["method"] in ("packed, compensated, aligned", "uncompressed")
        )
        panel.plot(*zip(*best, strict=True), color="C3", linewidth=0.8)
        panel.set(title=model, xlabel="bits per expert weight", ylabel="perplexity", yscale="log", xlim=(3.5, 17.5))
        panel.grid(alpha=0.3, which="both")
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
