"""The part of `inspect`'s page on layers of coded experts."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .coded_inspection import SHOWN_EXPERT, Codebook, CodedLayerInspection

# The largest circle, for a point that all codes stand for; areas are in proportion.
_LARGEST_RADIUS = 30.0
_SIZE = 180

CODED_TEMPLATE = """\
{%- macro widths(layers) %}
{%- set step = 720 / layers[0].w13_bits | length %}
<figure>
<figcaption>Width of codes by layer (down) and expert (across), 4 light to 8 dark; above gate and up, below down\
</figcaption>
<svg viewBox="0 0 800 {{ 14 * layers | length + 2 }}" role="img" aria-label="Widths of codes">
{%- for layer in layers %}
{%- set row = loop.index0 %}
<text x="66" y="{{ 14 * row + 10 }}" text-anchor="end">{{ layer.layer }}</text>
{%- for kind in (layer.w13_bits, layer.w2_bits) %}
{%- set half = loop.index0 %}
{%- for bits in kind %}
<rect class="s0" x="{{ "%.2f" | format(70 + step * loop.index0) }}" y="{{ 14 * row + 6 * half }}" \
width="{{ "%.2f" | format(step) }}" height="6" fill-opacity="{{ "%.3f" | format(bits / 8) }}">\
<title>layer {{ layer.layer }}, expert {{ loop.index0 }}: {{ bits }} bits</title></rect>
{%- endfor %}
{%- endfor %}
{%- endfor %}
</svg>
</figure>
{%- endmacro %}
{%- macro scatter(plot) %}
<svg class="scatter" viewBox="0 0 180 196" role="img" aria-label="{{ plot.title }}">
<text x="90" y="10" text-anchor="middle">{{ plot.title }}</text>
<path d="M0 106 H180 M90 16 V196" fill="none" stroke="#bbb"/>
<text x="178" y="103" text-anchor="end">{{ "%.2g" | format(plot.reach) }}</text>
{%- for dot in plot.dots %}
<circle class="s0" cx="{{ "%.1f" | format(dot.x) }}" cy="{{ "%.1f" | format(16 + dot.y) }}" \
r="{{ "%.1f" | format(dot.radius) }}" fill-opacity="0.6"><title>{{ dot.title }}</title></circle>
{%- endfor %}
</svg>
{%- endmacro %}
"""


@dataclass(frozen=True)
class _Dot:
    x: float
    y: float
    radius: float
    title: str


@dataclass(frozen=True)
class Scatter:
    """A codebook as dots; `reach` is the largest coordinate, at the edge of the plot."""

    title: str
    reach: float
    dots: list[_Dot]


def draw_codebooks(layers: list[CodedLayerInspection]) -> Iterator[Scatter]:
    """A scatter plot of each codebook that was inspected, in places of the template `scatter`."""
    for layer in layers:
        for codebook in layer.codebooks:
            yield _draw(f"layer {layer.layer}, expert {SHOWN_EXPERT}, {codebook.matrix}", codebook)


def _draw(title: str, codebook: Codebook) -> Scatter:
    reach = max((abs(value) for point in codebook.points for value in point), default=0.0) or 1.0
    half, total = _SIZE / 2, sum(codebook.counts) or 1
    # Dots at the edge stay whole.
    scale = 0.94 * half / reach
    dots = [
        _Dot(
            half + scale * x,
            half - scale * y,
            max(0.6, _LARGEST_RADIUS * math.sqrt(count / total)),
            f"({x:.3g}, {y:.3g}): {count / total:.2%} of the codes",
        )
        for (x, y), count in zip(codebook.points, codebook.counts, strict=True)
    ]
    return Scatter(title, reach, dots)
