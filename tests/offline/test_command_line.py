"""The command line as a shell starts it: how light it is, and what it prints where."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.offline.faulty import assert_one_sentence, edit_tensors
from tests.tiny import build_tiny
from vllm_puzzle.cli import main, main_of

COMMANDS = ("convert", "verify", "unpack", "plan", "inspect")
HEAVY = ("torch", "transformers", "vllm", "numpy", "safetensors", "pydantic", "yaml", "tqdm", "huggingface_hub")


@pytest.fixture
def packed(source: Path, tmp_path: Path) -> Path:
    assert main(["convert", str(source), str(tmp_path / "packed"), "--rule", "paper"]) == 0
    return tmp_path / "packed"


@pytest.mark.parametrize(
    "words", [["--version"], ["--help"], *([command, "--help"] for command in COMMANDS)], ids=" ".join
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    program = (
        "import sys\n"
        "from vllm_puzzle.cli import main\n"
        "try:\n"
        f"    main({words!r})\n"
        "except SystemExit as end:\n"
        f"    print(end.code, [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_a_module_too(command: str) -> None:
    words = [sys.executable, "-m", f"vllm_puzzle.{command}", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: python -m vllm_puzzle.{command} ")


def test_json_has_one_shape(source: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, again = str(tmp_path / "plain"), str(tmp_path / "again")
    for command, words, about in (
        ("convert", [str(source), again], again),
        ("verify", [str(source), str(packed)], str(packed)),
        ("unpack", [str(packed), plain], plain),
        ("plan", [str(source)], str(source)),
        ("inspect", [str(packed)], str(packed)),
    ):
        capsys.readouterr()
        assert main_of(command, [*words, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert list(told) == ["command", "path", "result"]
        assert (told["command"], told["path"]) == (command, about)
        assert told["result"]
    sizes = [sum(file.stat().st_size for file in Path(path).glob("*.safetensors")) for path in (again, plain)]
    capsys.readouterr()
    assert main(["unpack", str(packed), str(tmp_path / "other"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["result"]
    assert 0 < sizes[0] - result["checkpoint_bytes_before"] < 40_000
    assert 0 < sizes[1] - result["checkpoint_bytes_after"] < 40_000


def test_json_of_a_mistake(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, words in (
        ("convert", [str(tmp_path / "none"), str(tmp_path / "packed")]),
        ("verify", [str(source), str(source)]),
        ("unpack", [str(source), str(tmp_path / "plain")]),
        ("plan", [str(tmp_path / "none")]),
        ("inspect", [str(source)]),
    ):
        capsys.readouterr()
        assert main([command, *words, "--json"]) == 1
        captured = capsys.readouterr()
        told = json.loads(captured.out)
        assert told == {"command": command, "path": words[-1], "error": told["error"]}
        assert captured.err.splitlines()[-1] == f"error: {told['error']}"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_names_that_a_terminal_cannot_show(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what ASCII lacks nor what is no text at all ends a command with a traceback."""
    folder = tmp_path / os.fsdecode(b"caf\xc3\xa9 \xe6\x97\xa5")
    source = build_tiny("mixtral", folder / "source \N{SNOWMAN}")
    accent = "model.caf\N{LATIN SMALL LETTER E WITH ACUTE}"
    edit_tensors(source, lambda tensors: tensors.update({accent: tensors["lm_head.weight"][:1].clone()}))
    text = folder / os.fsdecode(b"t\xc3\xa9xt \xe9")
    text.write_text("\N{SNOWMAN} and some words " * 40, encoding="utf-8")
    packed = folder / "packed \N{SNOWMAN}"
    calibrated = ["--calibration", text, "--calibration-sequences", "1"]
    for status, words, said in (
        (0, ["convert", source, packed, *calibrated, "--rule", "paper"], "relative error of merged weights"),
        (0, ["verify", source, packed], "tensors equal to the source's"),
        (0, ["inspect", packed, "--html", folder / "page.html"], "sequences of"),
        (0, ["inspect", packed, "--json"], '"command": "inspect"'),
        (0, ["plan", source], "MixtralForCausalLM"),
        (0, ["unpack", packed, folder / "plain"], "every expert in BF16"),
        (1, ["convert", source, folder / text.name], "exists already"),
        (1, ["convert", source, packed, "--json"], "exists already"),
        (1, ["verify", source, folder / "plain"], "is not packed"),
    ):
        streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
        with monkeypatch.context() as patch:
            for name, stream in streams.items():
                patch.setattr(sys, name, stream)
            assert main([str(word) for word in words]) == status
        printed = b""
        for stream in streams.values():
            stream.flush()
            printed += stream.buffer.getvalue()
        assert said in printed.decode(encoding)


def test_a_path_that_is_no_text(source: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """safetensors cannot open it; only the calibration text may have such a name, as the test before shows."""
    bad = tmp_path / os.fsdecode(b"sorti\xe9")
    for words in (["convert", bad, tmp_path / "new"], ["plan", bad]):
        source.rename(bad)
        assert_one_sentence(capsys, [str(word) for word in words], "is not UTF-8", "a byte 0xe9", "another name")
        bad.rename(source)
    for words in (["verify", source, bad], ["inspect", bad], ["unpack", bad, tmp_path / "new"]):
        packed.rename(bad)
        assert_one_sentence(capsys, [str(word) for word in words], "is not UTF-8", "a byte 0xe9", "another name")
        bad.rename(packed)


def test_swapped_and_mistaken_checkpoints(
    source: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, new = str(source), str(packed), str(tmp_path / "new")
    for words, parts in (
        (["verify", b, a], ("the source comes first", f"verify {a} {b}")),
        (["verify", a, a], (f"{a} is not packed", "vllm-puzzle convert")),
        (["verify", b, b], (f"{b} is packed already", "that it was converted from")),
        (["inspect", a], (f"{a} is not packed", "vllm-puzzle plan")),
        (["unpack", a, new], (f"{a} is not packed", "vllm-puzzle convert")),
        (["convert", b, new], (f"{b} is packed already", "vllm-puzzle inspect", "vllm-puzzle unpack")),
        (["plan", b], (f"{b} is packed already", "vllm-puzzle inspect")),
        (["convert", "some-org/some-model", new], ("is not a directory", "hf download some-org/some-model")),
    ):
        assert_one_sentence(capsys, words, *parts)


@pytest.mark.heavy
def test_what_is_said_on_ctrl_c_is_true(
    source: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command is interrupted while it reads its first file."""

    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("json.loads", interrupt)
    for words, said in (
        (["convert", str(source), str(tmp_path / "new")], "nothing was written"),
        (["unpack", str(packed), str(tmp_path / "new")], "nothing was written; unpacking starts from the beginning"),
        (["verify", str(source), str(packed)], "not every tensor was compared, and nothing was changed"),
        (["plan", str(source)], "nothing was changed"),
        (["inspect", str(packed)], "nothing was changed"),
    ):
        capsys.readouterr()
        assert main(words) == 130
        assert capsys.readouterr().err == f"interrupted; {said}\n"


@pytest.mark.heavy
def test_the_command_line_of_a_shell(source: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=False)

    done = run("vllm_puzzle.convert", str(source), str(tmp_path / "packed"))
    assert done.returncode == 0
    assert done.stdout.startswith(f"{tmp_path / 'packed'}: experts 553 kB -> 276 kB, checkpoint 806 kB -> 529 kB, ")
    # Not a terminal: no progress bar, only what had to be announced.
    first, cost, pairing = done.stderr.splitlines()
    assert first == "no calibration text was given: experts are weighed by the magnitude of their weights alone"
    assert re.fullmatch(
        r"rule saliency with aligned neurons on cpu: about (?:1 second|\d+ seconds) "
        r"\([\d.]+ minutes a billion weights\), "
        r"\d+ MB of memory",
        cost,
    )
    assert pairing == "pairing random: 12 pairs, 4 a layer"
    again = run("vllm_puzzle.convert", str(source), str(tmp_path / "packed"))
    assert again.returncode == 1
    assert again.stderr == f"error: {tmp_path / 'packed'} exists already; choose another name or remove it\n"
    usage = run("vllm_puzzle.convert", str(source), str(tmp_path / "other"), "--rule", "magic")
    assert usage.returncode == 2
    assert "Traceback" not in usage.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["convert", "", "out"],
        ["convert", "source", ""],
        ["convert", "source", "out", "--calibration", ""],
        ["verify", "source", ""],
        ["unpack", "", "out"],
        ["plan", ""],
        ["inspect", "packed", "--html", ""],
        ["tune", ""],
    ],
    ids=" ".join,
)
def test_no_path_is_empty(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """As where a shell variable has no value: the current folder is not meant."""
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert "is empty; give a path" in capsys.readouterr().err
