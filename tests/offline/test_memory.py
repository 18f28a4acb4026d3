"""What is said of memory before a conversion starts, held against what it takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import build_tiny

_PROGRAM = """
import json, sys
from pathlib import Path
from vllm_puzzle.offline.convert import convert
from vllm_puzzle.offline.options import ConvertOptions

def resident(kind):
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(kind))

source, text, folder, rules = sys.argv[1:]
# What a process needs for itself, allocators and libraries that are loaded at the first use included.
convert(Path(source), Path(folder, "first"), ConvertOptions(Path(text), rule="compensated", align=False), print, print)
for number, (rule, align) in enumerate(json.loads(rules)):
    said = []
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = resident("VmRSS")
    options = ConvertOptions(Path(text), rule=rule, align=align)
    convert(Path(source), Path(folder, str(number)), options, said.append, lambda *_: None)
    print(json.dumps({"said": said[0], "taken": resident("VmHWM") - before}), file=sys.stderr)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux resets its high-water mark there")
def test_no_more_memory_is_taken_than_was_said(tmp_path: Path) -> None:
    source = build_tiny("mixtral", tmp_path / "source", hidden_size=384, intermediate_size=512, num_hidden_layers=2)
    text = tmp_path / "text"
    text.write_text("".join(f"{i * i % 977} apples and {i % 89} pears; " for i in range(150)))
    rules = [("paper", None), ("saliency", True), ("compensated", False)]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(source), str(text), str(tmp_path), json.dumps(rules)],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert len(lines) == len(rules)
    for (rule, align), line in zip(rules, lines, strict=True):
        said = float(line["said"].split()[-2]) * 1e9
        # It is said in tenths of a gigabyte.
        assert line["taken"] <= said + 0.05e9, (rule, align, line)
