"""What calibration meets in checkpoints and texts as they are found."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.offline.checkpoints import read_stored
from tests.offline.faulty import assert_one_sentence, edit_config, edit_tensors
from tests.tiny import build_tiny
from vllm_puzzle.cli import main
from vllm_puzzle.offline.checkpoints.source import SourceCheckpoint
from vllm_puzzle.offline.conversion.calibration_text import first_tokens, load_tokenizer, read_calibration_text

pytestmark = pytest.mark.heavy

Edit = Callable[[dict[str, torch.Tensor]], None]


def convert(source: Path, destination: Path, text: Path, *options: str) -> dict[str, torch.Tensor]:
    arguments = ["convert", str(source), str(destination), "--calibration", str(text), "--rule", "compensated"]
    assert main([*arguments, "--calibration-sequences", "2", *options]) == 0
    return read_stored(destination)


def add_to_every_layer(name: str) -> Edit:
    return lambda tensors: tensors.update({f"model.layers.{i}.self_attn.{name}": torch.ones(8) for i in range(3)})


@pytest.mark.heavy
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_leftovers_that_no_model_has_a_place_for(
    family: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = build_tiny(family, tmp_path / "source")
    without = convert(source, tmp_path / "without", text)
    for name in ("rotary_emb.inv_freq", "k_scale", "v_proj.v_scale"):
        edit_tensors(source, add_to_every_layer(name))
    capsys.readouterr()
    found = convert(source, tmp_path / "with", text)
    assert "leaves out" not in capsys.readouterr().err
    assert found.keys() - without.keys() == {name for name in found if "inv_freq" in name or "_scale" in name}
    assert all(torch.equal(tensor, found[name]) for name, tensor in without.items())


def test_a_tensor_that_nobody_knows_is_left_out_aloud(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_tensors(source, add_to_every_layer("temperature"))
    convert(source, tmp_path / "packed", text)
    said = [line for line in capsys.readouterr().err.splitlines() if "leaves out" in line]
    assert len(said) == 1
    assert "3 tensors" in said[0]
    assert "model.layers.0.self_attn.temperature" in said[0]


def test_a_tensor_that_is_not_there(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("model.layers.2.self_attn.o_proj.weight", "model.embed_tokens.weight"):
        edit_tensors(source, lambda tensors, name=name: tensors.pop(name))
        arguments = ["convert", str(source), str(tmp_path / "packed"), "--calibration", str(text)]
        assert_refused_with_text(capsys, arguments, name.removeprefix("model.layers.2."))


def assert_refused_with_text(capsys: pytest.CaptureFixture[str], arguments: list[str], *parts: str) -> None:
    """Whatever was announced before it, the last line is the only error, and nothing is left."""
    capsys.readouterr()
    assert main(arguments) == 1
    *announced, message = capsys.readouterr().err.strip().splitlines()
    assert message.startswith("error: ")
    assert not any("Traceback" in line or line.startswith("error") for line in announced)
    for part in parts:
        assert part in message
    assert not Path(arguments[2]).exists()
    assert not list(Path(arguments[2]).parent.glob(".*partial"))


def test_a_token_that_the_embedding_does_not_have(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    tokenizer["added_tokens"].append({"id": 259, "content": "apples", **added})
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    arguments = ["convert", str(source), str(tmp_path / "packed"), "--calibration", str(text)]
    assert_one_sentence(capsys, arguments, str(text), "'apples'", "token 259", "model.embed_tokens.weight", "0 to 258")


@pytest.mark.heavy
@pytest.mark.parametrize(
    "asked",
    [
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": "flash_attention_2"},
        {"attn_implementation": {"": "flash_attention_3", "text_config": "flash_attention_2"}},
    ],
)
def test_how_a_training_run_computed_is_not_asked(
    asked: dict[str, object], source: Path, text: Path, tmp_path: Path
) -> None:
    plain = convert(source, tmp_path / "plain", text)
    edit_config(source, **asked)
    packed = convert(source, tmp_path / "packed", text)
    assert all(torch.equal(tensor, packed[name]) for name, tensor in plain.items())
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert {name: config[name] for name in asked} == asked


def test_the_experts_of_a_training_run_are_not_asked(source: Path, text: Path, tmp_path: Path) -> None:
    plain = convert(source, tmp_path / "plain", text)
    edit_config(source, experts_implementation="nobody_has_it")
    packed = convert(source, tmp_path / "packed", text)
    assert all(torch.equal(tensor, packed[name]) for name, tensor in plain.items())
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["experts_implementation"] == "puzzlemoe"


NOT_FINITE = [
    ("mixtral", "model.layers.1.block_sparse_moe.gate.weight", (5, 7), torch.nan),
    ("mixtral", "model.layers.0.input_layernorm.weight", (3,), torch.inf),
    ("mixtral", "model.layers.2.self_attn.o_proj.weight", (95, 0), -torch.inf),
    # The text has many a space.
    ("mixtral", "model.embed_tokens.weight", (220, 11), torch.nan),
    ("qwen2_moe", "model.layers.2.mlp.shared_expert.down_proj.weight", (0, 1), torch.nan),
    ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias", (6,), torch.inf),
    ("deepseek_v3", "model.layers.0.mlp.up_proj.weight", (63, 95), torch.nan),
]


@pytest.mark.parametrize("rule", ["saliency", "compensated"])
@pytest.mark.parametrize("fault", NOT_FINITE, ids=lambda fault: fault[1])
def test_a_number_that_is_not_finite_is_named(
    fault: tuple[str, str, tuple[int, ...], float],
    rule: str,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    family, name, index, value = fault
    source = build_tiny(family, tmp_path / "source")
    edit_tensors(source, lambda tensors: tensors[name].__setitem__(index, value))
    arguments = ["convert", str(source), str(tmp_path / "packed"), "--calibration", str(text), "--rule", rule]
    place = f"row {index[0]} of {name}{list(index[1:])}" if "embed" in name else f"{name}{list(index)}"
    assert_refused_with_text(capsys, arguments, f"{place} is {value:g}", "repair the checkpoint")


@pytest.mark.parametrize("rule", ["saliency", "compensated"])
@pytest.mark.parametrize("name", ["self_attn.o_proj.weight", "block_sparse_moe.experts.{}.w2.weight"])
def test_a_last_layer_that_overflows(
    name: str, rule: str, source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every weight is finite, and what it computes is not."""

    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        if "experts" not in name:
            tensors[f"model.layers.2.{name}"].fill_(3e38)
            return
        for expert in range(8):
            tensors[f"model.layers.2.{name.format(expert)}"].fill_(65280.0)
            for projection in ("w1", "w3"):
                tensors[f"model.layers.2.{name.format(expert).replace('w2', projection)}"].fill_(65280.0)
        # What the experts see is as large as a norm allows.
        tensors["model.layers.2.post_attention_layernorm.weight"].fill_(1e18)

    edit_tensors(source, enlarge)
    arguments = ["convert", str(source), str(tmp_path / "packed"), "--calibration", str(text), "--rule", rule]
    assert_refused_with_text(capsys, arguments, "layer 2", "not finite", "overflows bfloat16")


def test_rows_of_the_embedding_that_no_token_has(source: Path, text: Path, tmp_path: Path) -> None:
    edit_tensors(source, lambda tensors: tensors["model.embed_tokens.weight"][258].fill_(torch.nan))
    convert(source, tmp_path / "packed", text)


@pytest.fixture(scope="module")
def story() -> str:
    """Of 200,000 characters, with words that only their ends tell apart, and line ends of both kinds."""
    words = ("pear", "pears", "peartree", "ünïcöde", "\r\n", "  ", "seven", "eleven", "of", "each;")
    return " ".join(words[i * i % 7 + i % 4] + str(i % 11) * (i % 3) for i in range(30_000))


@pytest.fixture(scope="module")
def tokenizer(story: str) -> PreTrainedTokenizerFast:
    whole = Tokenizer(models.BPE())
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    whole.train_from_iterator([story[:20_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=whole)


@pytest.mark.parametrize("num_tokens", [2, 1000, 20_000, 30_000, 1_000_000])
def test_the_first_tokens_are_those_of_the_whole_text(
    num_tokens: int, story: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "text").write_bytes(story.encode())
    read: list[int] = []

    def counting(text: str, **options: Any) -> Any:
        read.append(len(text))
        return tokenizer(text, **options)

    got = first_tokens(tmp_path / "text", counting, num_tokens)
    whole = tokenizer(story, verbose=False).input_ids
    assert len(whole) > 30_100
    assert got.tolist() == whole[:num_tokens]
    if num_tokens <= 1000:
        assert sum(read) < len(story) / 2


def test_a_text_is_read_as_far_as_it_is_wanted(source: Path, tmp_path: Path) -> None:
    """The record is of the whole file, the tokens are of its first part, and that part may be all."""
    checkpoint = SourceCheckpoint(source)
    text = tmp_path / "text"
    for content in ("a b\r\nc " * 10, "a b\r\nc " * 40_000):
        text.write_bytes(content.encode())
        read = read_calibration_text(text, checkpoint, checkpoint.config, 2)
        ids = read.token_ids
        assert read.record.sha256 == hashlib.sha256(text.read_bytes()).hexdigest()
        # A byte is a token there, and the sequence no longer than the model's longest.
        assert ids.shape == ((1, 70) if len(content) == 70 else (2, 256))
        whole = load_tokenizer(source)(content, verbose=False).input_ids
        assert ids.flatten().tolist() == whole[: ids.numel()]


@pytest.mark.parametrize(("family", "least"), [("mixtral", 64), ("llama4_text", 128)])
def test_a_text_of_too_few_tokens(family: str, least: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each of the 8 experts, of which a token goes to two or to one, needs to see some."""
    source, text = build_tiny(family, tmp_path / "source"), tmp_path / "text"
    arguments = ["convert", str(source), str(tmp_path / "packed"), "--rule", "paper", "--calibration", str(text)]
    for count in (0, 2, least - 1):
        text.write_text("hi" * (count // 2) + "!" * (count % 2))
        assert_one_sentence(capsys, arguments, str(text), f"has {count} tokens", f"at least {least}", "give some pages")
    assert not (tmp_path / "packed").exists()
    text.write_text("hi" * (least // 2))
    assert main(arguments) == 0


def test_one_sequence_is_enough(source: Path, tmp_path: Path) -> None:
    """Of a model that takes no more at once than the text has."""
    edit_config(source, max_position_embeddings=32)
    (tmp_path / "text").write_text("hi" * 16)
    checkpoint = SourceCheckpoint(source)
    read = read_calibration_text(tmp_path / "text", checkpoint, checkpoint.config, 1)
    assert read.token_ids.shape == (1, 32)


@pytest.mark.parametrize("place", [10, (1 << 20) - 1, 3 << 20])
def test_a_byte_that_is_not_utf8_wherever_it_is(
    place: int, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = bytearray("äpfel ".encode() * (1 << 19))
    arguments = ["convert", str(source), str(tmp_path / "packed"), "--rule", "paper", "--calibration"]
    arguments += [str(tmp_path / "text"), "--calibration-sequences", "1"]
    content[place] = 0xFF
    (tmp_path / "text").write_bytes(content)
    assert_one_sentence(capsys, arguments, str(tmp_path / "text"), "UTF-8", f"at byte {place}")
