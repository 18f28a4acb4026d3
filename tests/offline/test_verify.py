"""What `verify` finds, and what it lets pass."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.offline.faulty import EXPERT, assert_refused, edit_tensors
from tests.tiny import build_tiny
from vllm_puzzle.cli import main
from vllm_puzzle.format import unpack

pytestmark = pytest.mark.heavy

Change = Callable[[dict[str, torch.Tensor]], None]

RULES_THAT_VERIFY_KNOWS = [["--rule", "paper"], ["--rule", "saliency", "--no-align"]]
RULES_WITHOUT_A_TRACE = [["--rule", "saliency", "--align"], ["--rule", "compensated"]]


class Spoiler:
    """Changes one shard of a packed checkpoint; every change is made to the shard as it was written."""

    def __init__(self, source: Path, packed: Path, options: list[str]) -> None:
        assert main(["convert", str(source), str(packed), *options]) == 0
        assert main(["verify", str(source), str(packed)]) == 0
        self.file = packed / "model-00003-of-00004.safetensors"
        self.original = load_file(self.file)

    def spoil(self, change: Change) -> None:
        tensors = {key: value.clone() for key, value in self.original.items()}
        change(tensors)
        save_file(tensors, self.file, {"format": "pt"})


@pytest.mark.parametrize("rule", [*RULES_THAT_VERIFY_KNOWS, *RULES_WITHOUT_A_TRACE], ids=" ".join)
def test_verify_finds_what_was_changed(
    rule: list[str], source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "packed"
    calibration = ["--calibration", str(text), "--calibration-sequences", "2"]
    spoiler = Spoiler(source, packed, [*rule, *calibration])
    name = "model.layers.1.self_attn.q_proj.weight"
    word = next(key for key in spoiler.original if key.endswith("weight_packed"))
    # Each change is the smallest of its kind: a bit, an illegal word, a flipped sign.
    spoiler.spoil(
        lambda tensors: tensors[name].view(torch.int16)[2].__setitem__(3, tensors[name].view(torch.int16)[2, 3] ^ 1)
    )
    assert_refused(["verify", str(source), str(packed)], tmp_path, capsys, name, "differs")
    spoiler.spoil(lambda tensors: tensors[word][0].__setitem__(0, 0x0001))
    assert_refused(["verify", str(source), str(packed)], tmp_path, capsys, f"{word}[0, 0]", "never written")
    spoiler.spoil(lambda tensors: tensors.pop(word))
    assert main(["verify", str(source), str(packed)]) == 1
    if rule not in RULES_THAT_VERIFY_KNOWS:
        return
    members = torch.stack([unpack(spoiler.original[word], member) for member in (0, 1)])
    alone, together = (members != 0).sum(dim=0) == 1, (members != 0).all(dim=0)

    def index_of(where: torch.Tensor) -> tuple[int, int]:
        row, column = where.nonzero()[5].tolist()
        return row, column

    def flip(index: tuple[int, int], bits: int) -> None:
        spoiler.spoil(lambda tensors: tensors[word][index[0]].__setitem__(index[1], tensors[word][index] ^ bits))

    # A magnitude that is not the source's, the sign of either member, the other member holding it, and a magnitude
    # that is neither mate's nor between them.
    for index, bits in (
        (index_of(alone), 1),
        (index_of((members[0] != 0) & alone), -(1 << 15)),
        (index_of((members[1] != 0) & alone), 1 << 14),
        (index_of((members[0] > 0) & alone), 0b11 << 12),
        (index_of(together), -(1 << 15)),
        (index_of(together), 1 << 14),
        (index_of(together), 1 << 9),
    ):
        flip(index, bits)
        assert_refused(["verify", str(source), str(packed)], tmp_path, capsys, f"{word}{list(index)}", "cannot make")
    if rule == ["--rule", "paper"]:
        flip(index_of(together), 1)
        assert_refused(["verify", str(source), str(packed)], tmp_path, capsys, "cannot make")


@pytest.mark.parametrize("rule", RULES_WITHOUT_A_TRACE, ids=" ".join)
def test_verify_finds_an_expert_that_answers_like_another(
    rule: list[str], source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every word is valid and no element of a merged matrix follows from the source: what is left is the function."""
    packed = tmp_path / "packed"
    spoiler = Spoiler(source, packed, [*rule, "--calibration", str(text), "--calibration-sequences", "2"])
    words = sorted(key for key in spoiler.original if key.endswith("weight_packed"))
    first, second = words[:3], words[3:6]

    def exchange_pairs(tensors: dict[str, torch.Tensor]) -> None:
        for name, other in zip(first, second, strict=True):
            tensors[name], tensors[other] = spoiler.original[other], spoiler.original[name]

    def exchange_mates(tensors: dict[str, torch.Tensor]) -> None:
        for name in first:
            bits = spoiler.original[name].to(torch.int32) & 0xFFFF
            flags = ((bits & 0xA000) >> 1) | ((bits & 0x5000) << 1)
            tensors[name] = (flags | (bits & 0x0FFF)).to(torch.int16)

    def reorder_neurons_of_one_matrix(tensors: dict[str, torch.Tensor]) -> None:
        # Of up: what gate lets through on average would hide its own order.
        tensors[first[2]] = spoiler.original[first[2]].roll(1, 0)

    for change in (exchange_pairs, exchange_mates, reorder_neurons_of_one_matrix):
        spoiler.spoil(change)
        assert_refused(["verify", str(source), str(packed)], tmp_path, capsys, first[0].rsplit(".", 2)[0], "cosine")


@pytest.mark.parametrize("uneven", [False, True])
def test_verify_accepts_experts_that_no_token_reached(uneven: bool, text: Path, tmp_path: Path) -> None:
    """Their mates take from them what they can, the more the more tokens they have and the fewer channels matter."""
    text.write_text(text.read_text() * 5)
    source = build_tiny("olmoe", tmp_path / "source")

    def make_idle(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(3):
            # Of two opposite answers of the router one is above zero, so what answers zero is never among the first.
            router = tensors[f"model.layers.{layer}.mlp.gate.weight"]
            router[[1, 6]] = -router[[0, 5]]
            router[[2, 3, 4, 7]] = 0
            if uneven:
                # As in language models: most channels differ by little, a few by much.
                norm = tensors[f"model.layers.{layer}.post_attention_layernorm.weight"]
                norm.copy_(torch.linspace(-1.5, 1.5, len(norm)).exp())
                norm[[3, 50]] *= 20

    edit_tensors(source, make_idle)
    options = ["--calibration", str(text), "--rule", "compensated", "--no-align"]
    assert main(["convert", str(source), str(tmp_path / "packed"), *options]) == 0
    assert main(["verify", str(source), str(tmp_path / "packed")]) == 0


@pytest.mark.parametrize("rule", RULES_WITHOUT_A_TRACE, ids=" ".join)
def test_verify_accepts_an_expert_without_any_weight(rule: list[str], source: Path, text: Path, tmp_path: Path) -> None:
    def clear(tensors: dict[str, torch.Tensor]) -> None:
        for matrix in ("w1", "w2", "w3"):
            tensors[EXPERT.replace("w3", matrix)].zero_()

    edit_tensors(source, clear)
    options = [*rule, "--calibration", str(text), "--calibration-sequences", "2"]
    assert main(["convert", str(source), str(tmp_path / "packed"), *options]) == 0
    assert main(["verify", str(source), str(tmp_path / "packed")]) == 0


@pytest.mark.parametrize("rule", RULES_WITHOUT_A_TRACE, ids=" ".join)
def test_verify_knows_what_an_expert_alone_holds_under_every_rule(
    rule: list[str], source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "packed"
    options = [*rule, "--calibration", str(text), "--calibration-sequences", "2", "--compression", "12.5"]
    spoiler = Spoiler(source, packed, options)
    # Nobody is member 1 of a slot with one expert.
    word = next(
        key
        for key, words in spoiler.original.items()
        if key.endswith("w3.weight_packed") and not bool(unpack(words, 1).any())
    )
    spoiler.spoil(lambda tensors: tensors[word][1].__setitem__(2, tensors[word][1, 2] ^ 1))
    assert_refused(["verify", str(source), str(packed)], tmp_path, capsys, f"{word}[1, 2]", "cannot make")


def test_files_are_those_that_were_written(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = tmp_path / "packed"
    assert main(["convert", str(source), str(packed), "--rule", "paper"]) == 0
    shard = packed / "model-00002-of-00004.safetensors"
    content = shard.read_bytes()
    # What no tensor shows.
    assert content.count(b'"format":"pt"') == 1
    shard.write_bytes(content.replace(b'"format":"pt"', b'"format":"tp"'))
    assert_refused(["verify", str(source), str(packed)], tmp_path, capsys, str(shard), "SHA-256")
    shard.write_bytes(content)
    manifest = packed / "puzzlemoe_manifest.json"
    written = manifest.read_text()
    for change, part in (
        (written.replace("00002-of", "00009-of"), "which the index does not"),
        (written.replace("tool_version", "tool"), "tool_version"),
        ("{", "cannot be read as JSON"),
    ):
        manifest.write_text(change)
        assert_refused(["verify", str(source), str(packed)], tmp_path, capsys, str(manifest), part)
    manifest.unlink()
    assert_refused(["verify", str(source), str(packed)], tmp_path, capsys, str(manifest), "is missing")


@pytest.mark.parametrize(("activation", "found"), [("gelu", "cosine"), ("silu", "SHA-256")])
def test_verify_asks_experts_as_their_config_says(
    activation: str, found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was changed answers much unlike its source through gelu, and still somewhat like it through silu."""
    overrides = {"hidden_act": activation, "initializer_range": 0.1}
    source, packed = build_tiny("mixtral", tmp_path / "source", **overrides), tmp_path / "packed"
    spoiler = Spoiler(source, packed, ["--rule", "saliency", "--align"])
    gate, _, up = sorted(key for key in spoiler.original if key.endswith("weight_packed"))[:3]

    def negate(words: torch.Tensor) -> None:
        # Member 0, of which bit 13 is the mask and bit 15 the sign.
        words ^= (words & (1 << 13)) << 2

    def change(tensors: dict[str, torch.Tensor]) -> None:
        # gelu(-g) has less of gelu(g) than silu(-g) of silu(g); the rows of which up alone is negated outweigh it.
        negate(tensors[up])
        negate(tensors[gate][8:])

    spoiler.spoil(change)
    assert_refused(["verify", str(source), str(packed)], tmp_path, capsys, found)


def test_a_rule_of_a_later_release(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it may have made of an element is not known."""
    packed = tmp_path / "packed"
    assert main(["convert", str(source), str(packed), "--rule", "paper"]) == 0
    config = packed / "config.json"
    config.write_text(config.read_text().replace('"rule": "paper"', '"rule": "later"'))
    assert_refused(["verify", str(source), str(packed)], tmp_path, capsys, "rule later", "['paper',", "the release")


@pytest.mark.parametrize(
    ("other", "parts"),
    [
        ("qwen3_moe", ("family Qwen3MoeForCausalLM", "MixtralForCausalLM")),
        ("mixtral", ("SHA-256",)),
    ],
)
@pytest.mark.parametrize("rule", ["paper", "saliency"])
def test_another_source_is_told_from_a_changed_checkpoint(
    rule: str, other: str, parts: tuple[str, ...], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed, wrong = tmp_path / "packed", build_tiny(other, tmp_path / "other")
    assert main(["convert", str(source), str(packed), "--rule", rule]) == 0
    if other == "mixtral":
        # A fine-tune of the same sizes.
        edit_tensors(wrong, lambda tensors: tensors["lm_head.weight"].mul_(1.5))
    refused = f"{wrong} is not what {packed} was converted from"
    assert_refused(["verify", str(wrong), str(packed)], tmp_path, capsys, refused, *parts)
    assert main(["verify", str(source), str(packed)]) == 0
