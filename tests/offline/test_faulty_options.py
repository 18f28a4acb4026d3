"""A mistake on the command line or in the calibration text: one sentence, and nothing changed."""

from pathlib import Path

import pytest

from tests.offline.faulty import assert_refused


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--tau", "1.5"], ("--tau 1.5",)),
        (["--tau", "0.3"], ("--tau 0.3", "--rule paper", "leave out --tau")),
        (["--rule", "saliency", "--tau", "0.4"], ("--tau 0.4", "--rule paper", "leave out --tau")),
        (["--compression", "60"], ("--compression 60", "50 is the most")),
        (["--max-expert-parallel", "3"], ("--max-expert-parallel 3", "8 experts")),
        (["--max-expert-parallel", "0"], ("--max-expert-parallel 0",)),
        (["--calibration-sequences", "0", "--calibration", "x"], ("--calibration-sequences 0",)),
        (["--calibration", "nowhere.txt"], ("nowhere.txt does not exist",)),
        (["--rule", "compensated"], ("--rule compensated needs to see tokens", "--calibration FILE")),
        (["--pairing", "coactivation"], ("--pairing coactivation needs to see tokens", "--calibration FILE")),
        (["--rule", "paper", "--align"], ("--rule paper", "leave out --align")),
        (["--device", "tpu"], ("--device tpu", "cpu or cuda")),
        (["--device", "meta"], ("--device meta",)),
        (["--device", "cuda"], ("--device cuda", "give cpu")),
        (["--device", "cuda:1"], ("--device cuda:1", "give cpu")),
    ],
)
def test_a_wrong_option(
    options: list[str],
    parts: tuple[str, ...],
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert_refused(["convert", str(source), str(tmp_path / "packed"), *options], tmp_path, capsys, *parts)


@pytest.mark.parametrize(("content", "part"), [(b"", "has 0 tokens"), (b"\xff\xfe\x00\x01", "cannot be read as UTF-8")])
def test_an_unusable_calibration_text(
    content: bytes, part: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.write_bytes(content)
    arguments = ["convert", str(source), str(tmp_path / "packed"), "--calibration", str(text)]
    assert_refused(arguments, tmp_path, capsys, part)


def test_calibration_without_a_tokenizer(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source / "tokenizer.json").unlink()
    text = tmp_path / "text"
    text.write_text("some words " * 50)
    arguments = ["convert", str(source), str(tmp_path / "packed"), "--calibration", str(text)]
    assert_refused(arguments, tmp_path, capsys, "has no tokenizer")
