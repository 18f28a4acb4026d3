"""docs/models.md, from the statuses of the classes and what vLLM's source says of them.

`python -m tests.models.page` writes it again.
"""

from pathlib import Path

from tests.models.facts import experts_on_disk, holds_any_text_model, recorded
from tests.models.statuses import FAMILIES, STATUSES

PATH = Path(__file__).parents[2] / "docs" / "models.md"
_TEMPLATE = Path(__file__).with_name("page.md")
_HEADER = (
    "| family | convert, verify, unpack | CPU engine | Triton engine, GPU | tensor parallel (2, CPU) | "
    "expert parallel (2, CPU) | data or pipeline parallel |\n|---|---|---|---|---|---|---|\n"
)

_NOTES = ("", "¹", "²", "³", "⁴")


def page() -> str:
    """The whole page."""
    text = _TEMPLATE.read_text()
    for mark, value in (
        ("families", _families()),
        ("classes", _classes()),
        ("dense", _dense()),
        ("wrappers", _wrappers()),
    ):
        text = text.replace(f"{{{mark}}}", value)
    return text


def _families() -> str:
    rows = []
    for family in FAMILIES:
        ranks = "tested" if family.ranks else "not yet"
        served = f"{family.served}{_NOTES[family.note]}"
        gpu = "interpreted" if family.interpreted else "not yet"
        rows.append(f"| {family.title} | tested | {served} | {gpu} | {ranks} | {ranks} | not yet |\n")
    return _HEADER + "".join(rows)


def _classes() -> str:
    classes, notes = recorded(), {family.model: _NOTES[family.note] for family in FAMILIES}
    rows = ["| class | its experts in a layer | packed | vLLM on a CPU, unpacked |\n|---|---|---|---|\n"]
    for name, status in sorted(STATUSES.items(), key=lambda item: item[0].lower()):
        if status.word == "dense":
            continue
        word = f"{status.word}: {status.why}" if status.why else status.word
        cpu = f"{status.cpu or 'not tried'}{notes.get(status.model, '')}"
        rows.append(f"| {name} | {experts_on_disk(classes[name])} | {word} | {cpu} |\n")
    return "".join(rows)


def _dense() -> str:
    return ", ".join(sorted((name for name, status in STATUSES.items() if status.word == "dense"), key=str.lower))


def _wrappers() -> str:
    names = [name for name, sources in recorded().items() if holds_any_text_model(sources) and name not in STATUSES]
    return ", ".join(sorted(names, key=str.lower))


if __name__ == "__main__":
    PATH.write_text(page())
