"""Options from a file, and results as JSON."""

import json
from pathlib import Path

import pytest

from vllm_puzzle.cli import main, main_of


def provenance(packed: Path) -> dict[str, object]:
    config = json.loads((packed / "config.json").read_text())
    return dict(config["quantization_config"]["provenance"])


def test_a_file_says_what_the_command_line_does_not(source: Path, tmp_path: Path) -> None:
    options = tmp_path / "options.yaml"
    options.write_text("rule: saliency\nalign: false\nseed: 5\ncompression: 25\nmax_expert_parallel: 1\n")
    assert main(["convert", str(source), str(tmp_path / "a"), "--config", str(options)]) == 0
    assert main_of("convert", [str(source), str(tmp_path / "b"), f"--config={options}", "--seed", "6"]) == 0
    first, second = provenance(tmp_path / "a"), provenance(tmp_path / "b")
    assert (first["rule"], first["align"], first["seed"], first["compression"]) == ("saliency", False, 5, 25.0)
    assert {**first, "seed": 6} == second


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("rule: magic", "invalid choice: 'magic'"),
        ("rules: paper", "--rules=paper"),
        ("seed: many", "invalid int value: 'many'"),
        ("seed: [1, 2]", "seed is a list"),
        ("- rule", "no mapping"),
        ("rule: 'paper", "cannot be read as YAML"),
        (None, "cannot be read as YAML"),
    ],
)
def test_a_file_without_sense_is_a_usage_error(
    content: str | None, part: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = tmp_path / "options.yaml"
    if content is not None:
        options.write_text(content)
    with pytest.raises(SystemExit) as error:
        main(["convert", str(source), str(tmp_path / "packed"), "--config", str(options)])
    assert error.value.code == 2
    assert part in capsys.readouterr().err
    assert not (tmp_path / "packed").exists()


def test_results_as_json(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = tmp_path / "packed"
    assert main(["convert", str(source), str(packed), "--rule", "paper", "--json"]) == 0
    converted = json.loads(capsys.readouterr().out)
    assert converted["path"] == str(packed)
    assert converted["expert_bytes_after"] * 2 == converted["expert_bytes_before"]
    assert main(["verify", str(source), str(packed), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["packed"] == 3 * 4 * 3
