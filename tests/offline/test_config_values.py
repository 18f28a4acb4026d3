"""Values of config.json that transformers refuses, or that the tools compute with: one sentence, whatever is wrong."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.offline.faulty import assert_one_sentence, edit_config
from tests.offline.planning import SPEED
from tests.tiny import build_tiny
from vllm_puzzle.cli import main
from vllm_puzzle.offline.checkpoints.dense import build_model
from vllm_puzzle.offline.checkpoints.expert_tensors import check_experts
from vllm_puzzle.offline.checkpoints.source import SourceCheckpoint
from vllm_puzzle.offline.conversion.calibration import Calibrator
from vllm_puzzle.offline.conversion.options import ConvertOptions
from vllm_puzzle.offline.errors import CheckpointError
from vllm_puzzle.offline.reports.model_sizes import read_model_sizes
from vllm_puzzle.offline.reports.sizing import size_model


def read(path: Path) -> None:
    """All that converting, verifying and planning make of a config, without the tensors."""
    checkpoint = SourceCheckpoint(path)
    check_experts(checkpoint, checkpoint.shape)
    size_model(read_model_sizes(str(path)), ConvertOptions(), None, 0.9, SPEED)
    token_ids = torch.ones(1, 4, dtype=torch.long)
    Calibrator(checkpoint, build_model(checkpoint.config, "config.json"), token_ids, torch.device("cpu")).embed()


# What each family's own layers and experts are computed from, beside what all families have.
OF_FAMILY = {
    "mixtral": [
        "num_local_experts",
        "architectures",
        "model_type",
        "rope_parameters",
        "rope_scaling",
        "hidden_act",
        "num_labels",
    ],
    "qwen2_moe": ["decoder_sparse_step", "mlp_only_layers", "moe_intermediate_size"],
    "deepseek_v3": ["first_k_dense_replace", "moe_layer_freq", "num_nextn_predict_layers", "kv_lora_rank", "n_group"],
    "ernie4_5_moe": ["moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval", "moe_k"],
    "granitemoe": ["residual_multiplier", "num_local_experts"],
    "llama4_text": ["moe_layers", "interleave_moe_layer_step", "no_rope_layers"],
}
OF_ALL = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "num_experts_per_tok"]
OF_ALL += ["vocab_size", "max_position_embeddings", "head_dim", "dtype", "attn_implementation", "num_labels"]

FIELDS = [(family, name) for family, names in OF_FAMILY.items() for name in names]
FIELDS += [("mixtral", name) for name in OF_ALL]

VALUES = [None, [{"a": 1}], "auto", 0, -1, 1.5, 10**12, {"rope_type": "unheard-of", "rope_theta": 1e4}]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {family: build_tiny(family, root / family) for family in OF_FAMILY}


@contextmanager
def edited(path: Path, **changes: object) -> Iterator[None]:
    content = (path / "config.json").read_text()
    edit_config(path, **changes)
    try:
        yield
    finally:
        (path / "config.json").write_text(content)


@pytest.mark.parametrize(("family", "name"), FIELDS)
def test_no_value_of_a_config_ends_in_a_traceback(family: str, name: str, sources: dict[str, Path]) -> None:
    sentences = []
    for value in VALUES:
        with edited(sources[family], **{name: value}):
            try:
                read(sources[family])
            except CheckpointError as error:
                sentences.append(str(error))
    assert all("\n" not in sentence for sentence in sentences)
    # How attention is computed is not asked, and what is left open has a default.
    assert sentences or name in ("attn_implementation", "rope_scaling", "no_rope_layers")


@pytest.mark.parametrize(
    ("family", "changes", "parts"),
    [
        ("mixtral", {"hidden_act": "swish7"}, ("hidden_act 'swish7'", "activation")),
        ("mixtral", {"num_experts_per_tok": 9}, ("num_experts_per_tok 9", "from 1 to 8")),
        ("mixtral", {"num_attention_heads": 0}, ("num_attention_heads",)),
        ("mixtral", {"num_hidden_layers": 10**9}, ("num_hidden_layers 1000000000",)),
        ("mixtral", {"architectures": "MixtralForCausalLM"}, ("architectures 'MixtralForCausalLM'", "a list")),
        ("mixtral", {"rope_parameters": {"rope_type": "nonsense", "rope_theta": 1e4}}, ("'nonsense'", "correct")),
        ("mixtral", {"dtype": "auto"}, ("cannot read",)),
        ("mixtral", {"router_aux_loss_coef": "0"}, ("router_aux_loss_coef", "expected float, got str")),
        ("qwen2_moe", {"decoder_sparse_step": 0}, ("decoder_sparse_step 0", "at least 1")),
        ("deepseek_v3", {"moe_layer_freq": 0}, ("moe_layer_freq 0", "at least 1")),
        ("deepseek_v3", {"moe_layer_freq": [0, 1, 1]}, ("moe_layer_freq [0, 1, 1]", "integer")),
        ("ernie4_5_moe", {"moe_k": None}, ("moe_k None",)),
        ("ernie4_5_moe", {"moe_layer_interval": 0}, ("moe_layer_interval 0",)),
        ("granitemoe", {"residual_multiplier": None}, ("residual_multiplier None", "finite number")),
    ],
)
def test_every_command_says_what_is_wrong(
    family: str,
    changes: dict[str, object],
    parts: tuple[str, ...],
    packed: dict[str, Path],
    sources: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, other = sources[family], packed[family]
    with edited(source, **changes), edited(other, **changes):
        for arguments in (
            ["convert", source, tmp_path / "new"],
            ["plan", source],
            ["verify", source, other],
            ["unpack", other, tmp_path / "plain"],
            ["inspect", other],
        ):
            assert_one_sentence(capsys, [str(each) for each in arguments], "config.json", *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def packed(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("packed")
    made = {family: root / family for family in OF_FAMILY}
    for family, path in made.items():
        assert main(["convert", str(sources[family]), str(path), "--rule", "paper"]) == 0
    return made


def test_an_integer_that_can_only_mean_a_float(source: Path, tmp_path: Path) -> None:
    """transformers refuses it, and so does vLLM, which reads configs by transformers."""
    edit_config(source, router_aux_loss_coef=0, rms_norm_eps=1)
    assert main(["plan", str(source)]) == 0
    assert main(["convert", str(source), str(tmp_path / "packed"), "--rule", "paper"]) == 0
    assert main(["verify", str(source), str(tmp_path / "packed")]) == 0
    # A checkpoint of an earlier version has the integer still.
    edit_config(tmp_path / "packed", initializer_range=1)
    assert main(["inspect", str(tmp_path / "packed")]) == 0
    assert main(["unpack", str(tmp_path / "packed"), str(tmp_path / "plain")]) == 0
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    for name, value in (("router_aux_loss_coef", 0.0), ("rms_norm_eps", 1.0), ("initializer_range", 1.0)):
        assert isinstance(config[name], float)
        assert config[name] == value


def test_a_config_that_is_not_of_the_packed_experts(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "packed"
    assert main(["convert", str(source), str(packed), "--rule", "paper"]) == 0
    edit_config(packed, num_local_experts=6)
    for arguments in (["verify", source, packed], ["unpack", packed, tmp_path / "plain"], ["inspect", packed]):
        assert_one_sentence(capsys, [str(each) for each in arguments], "6 experts", "quantization_config", "8")


def test_nesting_beyond_reason(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    assert_one_sentence(capsys, ["plan", str(source)], "config.json cannot be read as JSON")


@pytest.mark.parametrize("value", ["x", [], 3])
def test_a_quantization_config_that_is_no_object(
    value: object, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(source, quantization_config=value)
    for arguments in (["convert", str(source), str(tmp_path / "packed")], ["plan", str(source)]):
        parts = (str(source / "config.json"), f"quantization_config {value!r}", "an object is expected")
        assert_one_sentence(capsys, arguments, *parts)


@pytest.mark.parametrize(
    ("family", "changes", "parts"),
    [
        ("mixtral", {"hidden_act": "relu"}, ("hidden_act 'relu'", "'silu', 'gelu', 'gelu_pytorch_tanh'", "unpacked")),
        ("deepseek_v3", {"n_group": 3}, ("n_group 3", "does not divide its 8 experts")),
        ("granitemoe", {"logits_scaling": 0}, ("logits_scaling 0", "correct it")),
    ],
)
def test_what_could_not_be_served_is_not_converted(
    family: str,
    changes: dict[str, object],
    parts: tuple[str, ...],
    sources: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = sources[family]
    with edited(source, **changes):
        for arguments in (["convert", str(source), str(tmp_path / "new")], ["plan", str(source)]):
            assert_one_sentence(capsys, arguments, str(source / "config.json"), *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
def test_other_activations_that_can_be_served(activation: str, source: Path, tmp_path: Path) -> None:
    edit_config(source, hidden_act=activation)
    assert main(["convert", str(source), str(tmp_path / "packed"), "--rule", "paper"]) == 0
