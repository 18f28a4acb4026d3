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
        ("rules: paper", "options.yaml: there is no option rules; did you mean rule?"),
        ("calibraton_sequences: 5", "no option calibraton_sequences; did you mean calibration-sequences?"),
        ("xyz: 5", "no option xyz; known are align, bits, "),
        ("no-align: true", "no option no-align; did you mean align?"),
        ("config: other.yaml", "no option config"),
        ("help: true", "no option help"),
        ("source: here", "source is given on the command line, not in a file"),
        ("destination: there", "destination is given on the command line, not in a file"),
        ("rule: paper\nseed: 1\nrule: saliency", "has rule twice"),
        ("max_expert_parallel: 1\nmax-expert-parallel: 2", "has max-expert-parallel twice"),
        ("rule: [a]", "rule is a list"),
        ("rule: {a: b}", "rule is a dict"),
        ("rule: true", "rule is true; give one value"),
        ("rule: no", "rule is false; give one value"),
        ("rule:", "rule has no value"),
        ("resume: paper", "resume is 'paper'; write true or false"),
        ("align: 1", "align is 1; write true or false"),
        ("seed: 2026-02-30", "cannot be read as YAML"),
        ("shard_size: 1e999GB", "is no size"),
        ("", "no mapping"),
        ("seed: many", "invalid int value: 'many'"),
        ("seed: [1, 2]", "seed is a list"),
        ("- rule", "no mapping"),
        ("rule: 'paper", "cannot be read as YAML"),
        (None, "cannot be read: No such file or directory; give a file"),
    ],
)
def test_a_file_without_sense_is_a_usage_error(
    content: str | None, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = tmp_path / "options.yaml"
    if content is not None:
        options.write_text(content)
    with pytest.raises(SystemExit) as error:
        main(["convert", str(tmp_path), str(tmp_path / "packed"), "--config", str(options)])
    assert error.value.code == 2
    assert part in capsys.readouterr().err
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("words", [["--config"], ["--conf", "options.yaml"], ["--calib", "none"]])
def test_what_is_no_option_is_a_usage_error(words: list[str], tmp_path: Path) -> None:
    """Part of a name too, which a file could not have either."""
    with pytest.raises(SystemExit) as error:
        main(["convert", str(tmp_path / "source"), str(tmp_path / "packed"), *words])
    assert error.value.code == 2


def test_a_flag_that_is_off_is_as_if_it_were_not_there(source: Path, tmp_path: Path) -> None:
    options = tmp_path / "options.yaml"
    options.write_text("resume: false\nrule: paper\n")
    assert main(["convert", str(source), str(tmp_path / "packed"), "--config", str(options)]) == 0


def test_results_as_json(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = tmp_path / "packed"
    assert main(["convert", str(source), str(packed), "--rule", "paper", "--json"]) == 0
    converted = json.loads(capsys.readouterr().out)["result"]
    assert converted["expert_bytes_after"] * 2 == converted["expert_bytes_before"]
    assert main(["verify", str(source), str(packed), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["result"]["packed"] == 3 * 4 * 3
