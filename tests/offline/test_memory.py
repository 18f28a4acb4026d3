"""What is said of memory before a conversion starts, compared with what it takes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.convert.source import MixtralSizes, write_source
from tests.tiny import build_tiny, short_text

pytestmark = pytest.mark.heavy

needs_a_mark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="Linux resets its high-water mark there"
)

_PROGRAM = """
import json, sys
from pathlib import Path
from vllm_puzzle.offline.conversion.convert import convert
from vllm_puzzle.offline.conversion.options import ConvertOptions

def resident(kind):
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(kind))

first, source, text, folder, recipes = sys.argv[1:]
text = Path(text) if text else None
# What a process needs for itself, allocators and libraries that are loaded at the first use included.
rule = "compensated" if text else "saliency"
convert(Path(first), Path(folder, "warm-up"), ConvertOptions(text, rule=rule, align=False), print, print)
for number, recipe in enumerate(json.loads(recipes)):
    said = []
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = resident("VmRSS")
    options = ConvertOptions(text, **recipe)
    convert(Path(source), Path(folder, str(number)), options, said.append, lambda *_: None)
    said = [sentence for sentence in said if sentence.startswith("rule")]
    print(json.dumps({"said": said[0], "taken": resident("VmHWM") - before}), file=sys.stderr)
"""


def check_memory(first: Path, source: Path, text: str, folder: Path, recipes: list[dict[str, Any]]) -> None:
    """Converts `first`, and then `source` with each of the options `recipes`, in one process."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(first), str(source), text, str(folder), json.dumps(recipes)],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert len(lines) == len(recipes)
    for recipe, line in zip(recipes, lines, strict=True):
        number, unit = line["said"].split()[-4:-2]
        said = float(number) * {"MB": 1e6, "GB": 1e9}[unit]
        # It is said in three digits.
        assert line["taken"] <= 1.005 * said, (recipe, line)


@needs_a_mark
def test_no_more_memory_is_taken_than_was_said(tmp_path: Path) -> None:
    source = build_tiny("mixtral", tmp_path / "source", hidden_size=384, intermediate_size=512, num_hidden_layers=2)
    text = tmp_path / "text"
    text.write_text(short_text(150))
    recipes = [
        {"rule": "paper"},
        {"rule": "saliency", "align": True},
        {"rule": "compensated", "align": False},
        {"bits": 2.5},
    ]
    check_memory(source, source, str(text), tmp_path, recipes)


@needs_a_mark
def test_without_calibration_no_layer_is_in_memory(tmp_path: Path) -> None:
    """One of 400 MB: what is said leaves no room for it."""
    shape = MixtralSizes(num_hidden_layers=1, hidden_size=1024, intermediate_size=2048, num_local_experts=32)
    write_source(tmp_path / "first", replace(shape, num_local_experts=4))
    write_source(tmp_path / "source", shape)
    recipes = [{"rule": "saliency", "align": False}]
    check_memory(tmp_path / "first", tmp_path / "source", "", tmp_path, recipes)
