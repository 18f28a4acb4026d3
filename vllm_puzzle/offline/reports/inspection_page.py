"""The HTML page of `vllm-puzzle inspect --html`: one file, nothing loaded from elsewhere."""

import os
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from ..errors import CheckpointError
from .coded_page import CODED_TEMPLATE, draw_codebooks
from .inspection import Inspection
from .inspection_report import (
    CODED_COLUMNS,
    LAYER_COLUMNS,
    WIDTHS_NOTE,
    coded_note,
    coded_row,
    fact_rows,
    layer_row,
    losses_note,
    plain_note,
)


@dataclass(frozen=True)
class _Bars:
    """A bar chart: each series has one value per label, None where there is nothing to show."""

    title: str
    axis: str
    labels: list[str]
    series: dict[str, list[float | None]]

    @property
    def top(self) -> float:
        return max((value for values in self.series.values() for value in values if value is not None), default=0) or 1

    @property
    def label_step(self) -> int:
        """There is room for some 40 labels."""
        return 1 + len(self.labels) // 40


_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{{ inspection.checkpoint }}</title>
<style>
body { font: 15px/1.5 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; }
th, td { border-bottom: 1px solid #ddd; padding: 0.2em 0.8em; text-align: right; }
.facts th, .facts td { text-align: left; overflow-wrap: anywhere; }
figure { margin: 2em 0; }
figcaption { font-weight: bold; }
svg { width: 100%; font: 10px sans-serif; }
.scatter { width: 24%; }
.s0 { fill: #3465a4; }
.s1 { fill: #e08e1b; }
</style>
</head>
<body>
{%- macro bars(chart) %}
{%- set step = 720 / chart.labels | length %}
{%- set width = step * 0.8 / chart.series | length %}
<figure>
<figcaption>{{ chart.title }}</figcaption>
<svg viewBox="0 0 800 230" role="img" aria-label="{{ chart.title }}">
<text x="66" y="24" text-anchor="end">{{ "%.3g" | format(chart.top) }}</text>
<text x="66" y="200" text-anchor="end">0</text>
<path d="M70 20 V200 H790" fill="none" stroke="#888"/>
{%- for name, values in chart.series.items() %}
{%- set number = loop.index0 %}
<text class="s{{ number }}" x="{{ 70 + 200 * number }}" y="12">{{ name }}</text>
{%- for value in values %}
{%- if value is not none %}
{%- set height = 176 * value / chart.top %}
<rect class="s{{ number }}" x="{{ "%.2f" | format(70 + step * (loop.index0 + 0.1) + width * number) }}" \
y="{{ "%.2f" | format(200 - height) }}" width="{{ "%.2f" | format(width) }}" height="{{ "%.2f" | format(height) }}">\
<title>{{ chart.axis }} {{ chart.labels[loop.index0] }}: {{ "%.4g" | format(value) }} {{ name }}</title></rect>
{%- endif %}
{%- endfor %}
{%- endfor %}
{%- for label in chart.labels[::chart.label_step] %}
<text x="{{ "%.2f" | format(70 + step * (loop.index0 * chart.label_step + 0.5)) }}" y="213" \
text-anchor="middle">{{ label }}</text>
{%- endfor %}
<text x="430" y="227" text-anchor="middle">{{ chart.axis }}</text>
</svg>
</figure>
{%- endmacro %}
<h1>{{ inspection.checkpoint }}</h1>
<table class="facts">
{%- for name, value in facts %}
<tr><th>{{ name }}</th><td>{{ value }}</td></tr>
{%- endfor %}
</table>
{%- if inspection.layers %}
<h2>Layers</h2>
<table>
<tr>{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr>
{%- for row in rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{%- endfor %}
</table>
<p>Shared: elements of the pairs that both members keep. Kept: weights of the pairs that survive in their own expert.
{{ losses }}</p>
{{ bars(charts[0]) }}
<figure>
<figcaption>The same by layer (down), each against its most frequent exponent</figcaption>
<svg viewBox="0 0 800 {{ 12 * inspection.layers | length + 2 }}" role="img" aria-label="Exponents by layer">
{%- for layer in inspection.layers %}
{%- set row = loop.index0 %}
{%- set largest = layer.exponents | max %}
{%- set width = 720 / layer.exponents | length %}
<text x="66" y="{{ 12 * row + 10 }}" text-anchor="end">{{ layer.layer }}</text>
{%- for count in layer.exponents %}
<rect class="s0" x="{{ "%.2f" | format(70 + width * loop.index0) }}" y="{{ 12 * row }}" \
width="{{ "%.2f" | format(width) }}" height="12" fill-opacity="{{ "%.3f" | format(count / largest) }}"/>
{%- endfor %}
{%- endfor %}
</svg>
</figure>
{%- for chart in charts[1:] %}
{{ bars(chart) }}
{%- endfor %}
{%- for title in missing %}
<p>{{ title }}: {{ "not estimated" if inspection.has_manifest else "not recorded" }}.</p>
{%- endfor %}
{%- endif %}
{%- if inspection.coded_layers %}
<h2>Layers of coded experts</h2>
<table>
<tr>{% for column in coded_columns %}<th>{{ column }}</th>{% endfor %}</tr>
{%- for row in coded_rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{%- endfor %}
</table>
<p>{{ coded_notes }}</p>
{{ widths(inspection.coded_layers) }}
<figure>
<figcaption>Codebooks: across the first weight of a code, gate's or an even row's of down, upwards the second; \
areas are in proportion to how many codes stand for a point</figcaption>
{%- for plot in codebooks %}
{{ scatter(plot) }}
{%- endfor %}
</figure>
{%- endif %}
{%- if inspection.plain_layers %}
<p>{{ plain_notes }}</p>
{%- endif %}
</body>
</html>
"""


def write_page(inspection: Inspection, file: Path) -> None:
    """Writes the page to `file`, which must not exist.

    Raises:
        CheckpointError: it exists, or cannot be written.
    """
    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(CODED_TEMPLATE + _PAGE)
    layers = inspection.layers
    charts = _charts(inspection) if layers else []
    drawn = [
        chart for chart in charts if any(value is not None for values in chart.series.values() for value in values)
    ]
    content = page.render(
        inspection=inspection,
        facts=fact_rows(inspection),
        losses=losses_note(inspection),
        columns=LAYER_COLUMNS,
        rows=[layer_row(layer, inspection.has_manifest) for layer in layers],
        charts=drawn,
        missing=[chart.title for chart in charts if chart not in drawn],
        coded_columns=CODED_COLUMNS,
        coded_rows=[coded_row(layer, inspection.has_manifest) for layer in inspection.coded_layers],
        coded_notes=f"{WIDTHS_NOTE} {coded_note(inspection)}",
        codebooks=list(draw_codebooks(inspection.coded_layers)),
        plain_notes=plain_note(inspection),
    )
    check_free(file)
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(content)
    except OSError as error:
        raise CheckpointError(f"--html {file} cannot be written ({error}); choose another place") from None


def _charts(inspection: Inspection) -> list[_Bars]:
    """What is shown of the layers of pairs."""
    layers, exponents = inspection.layers, inspection.exponents
    names = [str(layer.layer) for layer in layers]
    densities: dict[str, list[float | None]] = {
        "shared": [layer.shared_fraction for layer in layers],
        "kept": [layer.kept_fraction for layer in layers],
    }
    return [
        _Bars(
            f"Words by stored exponent, all layers; 0 is the zero word, 1 stands for 2^{inspection.smallest_exponent}",
            "exponent",
            [str(exponent) for exponent in range(len(exponents))],
            {"words": list(exponents)},
        ),
        _Bars("Densities of the masks in pairs", "layer", names, densities),
        _Bars("Estimated loss", "layer", names, {"loss": [layer.estimated_loss for layer in layers]}),
        _Bars("Relative error", "layer", names, {"error": [layer.relative_error for layer in layers]}),
    ]


def check_free(file: Path) -> None:
    """Raises CheckpointError where something has that name already, or there is no folder for it."""
    if os.path.lexists(file):
        raise CheckpointError(f"--html {file} exists already; choose another name or remove it")
    if not os.path.isdir(file.absolute().parent):
        raise CheckpointError(f"--html {file} cannot be written: {file.absolute().parent} is no folder; make it first")
