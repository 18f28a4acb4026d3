"""Every family through convert, verify and unpack by every rule, and what the model then computes."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import FAMILIES, build_tiny, dated_text
from vllm_puzzle.cli import main
from vllm_puzzle.format import PuzzleMoEQuantizationConfig
from vllm_puzzle.offline.merging.rules import RULES

pytestmark = pytest.mark.heavy

TEXT = dated_text(30)
MORE = {"saliency": ["--no-align"], "compensated": ["--align"]}
OPTIONS = {rule: ["--rule", rule, *MORE.get(rule, [])] for rule in RULES}


@dataclass
class Converted:
    """One family's checkpoint, packed by every rule and unpacked again."""

    source: Path
    packed: dict[str, Path]
    plain: dict[str, Path]

    def log_probabilities(self, path: Path) -> torch.Tensor:
        ids = AutoTokenizer.from_pretrained(self.source)(TEXT).input_ids
        tokens = torch.tensor(ids[: len(ids) // 256 * 256]).reshape(-1, 256)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        with torch.inference_mode():
            return model(tokens).logits.log_softmax(dim=-1)

    def divergence(self, rule: str) -> float:
        """The mean KL divergence from the source's answers on the calibration text."""
        source, merged = (self.log_probabilities(path) for path in (self.source, self.plain[rule]))
        return float((source.exp() * (source - merged)).sum(dim=-1).mean())


@pytest.fixture(scope="module", params=FAMILIES)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    root = tmp_path_factory.mktemp(request.param)
    source = build_tiny(request.param, root / "source")
    (root / "text").write_text(TEXT)
    packed, plain = ({rule: root / f"{kind}-{rule}" for rule in RULES} for kind in ("packed", "plain"))
    for rule, options in OPTIONS.items():
        arguments = ["convert", str(source), str(packed[rule]), "--calibration", str(root / "text"), *options]
        assert main(arguments) == 0
        assert main(["unpack", str(packed[rule]), str(plain[rule])]) == 0
    return Converted(source, packed, plain)


@pytest.mark.parametrize("rule", RULES)
def test_verify_accepts_it(rule: str, converted: Converted) -> None:
    assert main(["verify", str(converted.source), str(converted.packed[rule])]) == 0


def test_provenance_names_the_rule(converted: Converted) -> None:
    for rule, tau, align in (("paper", 0.4, False), ("saliency", None, False), ("compensated", None, True)):
        config = json.loads((converted.packed[rule] / "config.json").read_text())
        provenance = PuzzleMoEQuantizationConfig.parse(config["quantization_config"]).provenance
        assert (provenance.rule, provenance.tau, provenance.align) == (rule, tau, align)
    card = (converted.packed["compensated"] / "README.md").read_text()
    assert "| rule | `compensated`, mates' neurons aligned |" in card


def test_better_rules_answer_more_like_the_source(converted: Converted) -> None:
    paper, saliency, compensated = map(converted.divergence, ("paper", "saliency", "compensated"))
    assert 0 < compensated < 0.25 * paper
    # Two recurrent layers in three hand every loss on to all later tokens.
    share = 0.95 if "qwen3_next" in str(converted.source) else 0.75
    assert compensated < 0.7 * saliency < 0.7 * share * paper
