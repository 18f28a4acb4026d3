"""CONTRIBUTING's table of rooms says who may import whom: it is compared with every import there is."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
EVERYTHING = "everything"


def read_table() -> dict[str, set[str]]:
    """What each room may import, by the room: `format/` and all below it, `*.py` of one folder, or one file."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Where things are\n")[1].split("\n## ")[0]
    found = {}
    for _, rooms, _, allowed, _ in (line.split("|") for line in text.splitlines() if line.startswith("| `")):
        names = {EVERYTHING} if allowed.strip() == EVERYTHING else set(re.findall(r"`(.+?)`", allowed))
        found |= {room.removeprefix("vllm_puzzle/"): names for room in re.findall(r"`(.+?)`", rooms)}
    return found


def room_of(file: str, rooms: dict[str, set[str]]) -> str | None:
    """The row for a file, else for the Python files of its folder, else for the nearest folder around it."""
    name = file.removeprefix("vllm_puzzle/")
    folders = [f"{parent}/" for parent in Path(name).parents]
    return next((room for room in (name, str(Path(name).with_name("*.py")), *folders) if room in rooms), None)


def imported(file: str) -> Iterator[tuple[int, str]]:
    """Line and target of each import, those inside functions too: a file of this repository, or `vllm`."""
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = Path(file).parts[: -node.level] if node.level else ()
            module = ".".join([*package, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "vllm":
                yield node.lineno, "vllm"
            # What is imported is a module, or something in one.
            paths = (Path(*parts[:length]) for length in range(len(parts), 0, -1))
            files = (each for path in paths for each in (path.with_suffix(".py"), path / "__init__.py"))
            target = next((each for each in files if (ROOT / each).is_file()), None)
            if target is not None:
                yield node.lineno, target.as_posix()


def test_no_room_imports_what_the_table_does_not_allow() -> None:
    rooms, wrong = read_table(), []
    sources = [path for folder in ("vllm_puzzle", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]
    for file in sorted(path.relative_to(ROOT).as_posix() for path in sources):
        room = room_of(file, rooms)
        if room is None:
            wrong.append(f"{file} is in no room of the table")
            continue
        for line, target in imported(file):
            to = "vllm" if target == "vllm" else room_of(target, rooms)
            if to != room and not rooms[room] & {EVERYTHING, to}:
                wrong.append(f"{file}:{line} imports {target} ({to}), which {room} may not")
    assert not wrong, "\n".join(wrong)


def test_every_room_of_the_table_is_there() -> None:
    rooms = read_table()
    assert rooms
    assert [room for room in rooms if not any(ROOT.glob(f"vllm_puzzle/{room}")) and not any(ROOT.glob(room))] == []
