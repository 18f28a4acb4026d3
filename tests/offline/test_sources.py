"""What a source may hold besides one plain matrix per expert: fused experts, FP8, layers for multi-token prediction."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.offline.checkpoints import quantize, read_stored
from tests.offline.faulty import assert_refused, edit_config, edit_tensors
from tests.offline.planning import leave_only_the_index
from tests.tiny import FAMILIES, INTERMEDIATE_SIZE, NUM_EXPERTS, add_mtp_layer, build_tiny, by_expert
from vllm_puzzle.cli import main
from vllm_puzzle.format import parse_packed_name
from vllm_puzzle.offline.checkpoints.source import SourceCheckpoint

pytestmark = pytest.mark.heavy


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_reads_as_one_matrix_per_expert(family: str, tmp_path: Path) -> None:
    """That of the hub, and that of transformers' own modules with their names."""
    hub = build_tiny(family, tmp_path / "hub")
    own = build_tiny(family, tmp_path / "own", save={"save_original_format": False})
    on_hub, in_own = load_file(hub / "model.safetensors"), load_file(own / "model.safetensors")
    assert any(name.endswith((".gate_up_proj", "input_linear.weight")) for name in in_own)
    expected = by_expert(on_hub)
    for path, raw in ((hub, on_hub), (own, in_own)):
        checkpoint = SourceCheckpoint(path)
        got = checkpoint.read(checkpoint.tensors)
        assert same(expected, got)
        for name, info in checkpoint.tensors.items():
            assert info.shape == tuple(got[name].shape)
            assert info.num_bytes == info.plain_bytes == got[name].nbytes
        assert checkpoint.num_bytes == sum(tensor.nbytes for tensor in raw.values())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "phimoe", "granitemoe"])
def test_every_layout_is_packed_alike(family: str, text: Path, tmp_path: Path) -> None:
    packed = []
    options = ["--calibration", str(text), "--calibration-sequences", "2", "--rule", "saliency", "--no-align"]
    for name, original in (("hub", True), ("own", False)):
        source = build_tiny(family, tmp_path / name, save={"save_original_format": original})
        packed.append(tmp_path / f"{name}-packed")
        assert main(["convert", str(source), str(packed[-1]), *options]) == 0
        assert main(["verify", str(source), str(packed[-1])]) == 0
    assert same(*(read_stored(path) for path in packed))
    # The hash of the source too.
    assert len({(path / "config.json").read_text() for path in packed}) == 1


@pytest.mark.parametrize(
    ("family", "fused"),
    [("granitemoe", "block_sparse_moe.input_linear.weight"), ("llama4_text", "feed_forward.experts.gate_up_proj")],
)
def test_unpacking_gives_the_layout_of_the_hub(family: str, fused: str, tmp_path: Path) -> None:
    source, packed, plain = build_tiny(family, tmp_path / "source"), tmp_path / "packed", tmp_path / "plain"
    assert main(["convert", str(source), str(packed), "--compression", "0"]) == 0
    assert main(["unpack", str(packed), str(plain)]) == 0
    before, after = load_file(source / "model.safetensors"), read_stored(plain)
    assert f"model.layers.1.{fused}" in before
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        # What is packed alone loses only magnitudes below the smallest of a word.
        assert (tensor.float() - after[name].float()).abs().max() <= 2.0**-15


def test_block_scaled_fp8_is_packed_as_what_it_stands_for(text: Path, tmp_path: Path) -> None:
    source, plain = build_tiny("deepseek_v3", tmp_path / "source"), tmp_path / "plain"
    mtp = add_mtp_layer(source)
    quantize(source, plain)
    for path in (source, plain):
        options = ["--calibration", str(text), "--calibration-sequences", "2", "--rule", "paper"]
        assert main(["convert", str(path), str(tmp_path / f"{path.name}-packed"), *options]) == 0
        assert main(["verify", str(path), str(tmp_path / f"{path.name}-packed")]) == 0
    packed = read_stored(tmp_path / "source-packed")
    assert same(packed, read_stored(tmp_path / "plain-packed"))
    assert {tensor.dtype for tensor in packed.values()} == {torch.bfloat16, torch.float32, torch.int16}
    assert set(mtp) <= packed.keys()
    config = json.loads((tmp_path / "source-packed" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "puzzlemoe"
    # On the card the source has the size that it has on disk.
    matrices = 2 * NUM_EXPERTS * 3
    scales = 2 * NUM_EXPERTS * (2 * 2 * 4 + 3 * 2) * 4
    assert (
        f"| {matrices * 96 * INTERMEDIATE_SIZE + scales:,} |" in (tmp_path / "source-packed" / "README.md").read_text()
    )


V3_EXPERT = "model.layers.2.mlp.experts.5.up_proj.weight"
V3_DENSE = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (lambda tensors: tensors.pop(f"{V3_DENSE}_scale_inv"), (V3_DENSE, f"{V3_DENSE}_scale_inv is missing")),
        (
            lambda tensors: tensors.update({f"{V3_EXPERT}_scale_inv": torch.ones(2, 3)}),
            (f"{V3_EXPERT}_scale_inv has shape [2, 3]", "[40, 96]", "[36, 28]", "[2, 4]"),
        ),
        (
            lambda tensors: tensors.update({"lm_head.weight_scale_inv": torch.ones(2, 3)}),
            ("lm_head.weight_scale_inv has no F8_E4M3 tensor to scale",),
        ),
        (lambda tensors: tensors.pop(V3_EXPERT), (f"{V3_EXPERT}_scale_inv has no F8_E4M3",)),
    ],
)
def test_faulty_scales(
    spoil: Callable[[dict[str, torch.Tensor]], object],
    parts: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = build_tiny("deepseek_v3", tmp_path / "source")
    quantize(source, tmp_path / "plain")
    edit_tensors(source, spoil)
    assert_refused(["convert", str(source), str(tmp_path / "packed")], tmp_path, capsys, *parts)


DOWN = "model.layers.1.block_sparse_moe.output_linear.weight"
ROUTER = "model.layers.1.block_sparse_moe.router."


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (lambda tensors: tensors.pop(DOWN), (f"{DOWN} is missing", "three-dimensional")),
        (
            lambda tensors: tensors.update({DOWN: torch.zeros(8, 40, 96)}),
            (DOWN, "has shape [8, 40, 96]", "implies [8, 96, 40]"),
        ),
        (
            lambda tensors: tensors.update({DOWN: torch.zeros(8, 96, 40, dtype=torch.int8)}),
            ("model.layers.1.block_sparse_moe.experts.0.down_proj.weight", "I8", "dequantize"),
        ),
        (
            lambda tensors: tensors.update(
                {"model.layers.1.block_sparse_moe.experts.3.up_proj.weight": torch.zeros(40, 96)}
            ),
            ("experts.3.up_proj.weight is in model.layers.1.block_sparse_moe.input_linear.weight too",),
        ),
        (
            lambda tensors: tensors.update({f"{ROUTER}weight": torch.zeros(8, 96)}),
            (f"{ROUTER}weight and {ROUTER}layer.weight are the same tensor",),
        ),
        (lambda tensors: tensors[DOWN][5][7].__setitem__(3, torch.nan), ("experts.5.down_proj.weight[7, 3] is nan",)),
    ],
)
def test_faulty_fused_experts(
    spoil: Callable[[dict[str, torch.Tensor]], object],
    parts: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = build_tiny("granitemoe", tmp_path / "source")
    edit_tensors(source, spoil)
    assert_refused(["convert", str(source), str(tmp_path / "packed")], tmp_path, capsys, *parts)


@pytest.mark.parametrize(
    ("family", "layer"),
    [("deepseek_v3", "model.layers.3."), ("glm4_moe", "model.layers.3."), ("qwen3_next", "mtp.layers.0.")],
)
def test_layers_for_multi_token_prediction_stay(family: str, layer: str, text: Path, tmp_path: Path) -> None:
    source, packed, plain = build_tiny(family, tmp_path / "source"), tmp_path / "packed", tmp_path / "plain"
    names = add_mtp_layer(source, layer)
    assert any(".experts.7.down_proj.weight" in name for name in names)
    options = ["--calibration", str(text), "--calibration-sequences", "2", "--rule", "paper"]
    assert main(["convert", str(source), str(packed), *options]) == 0
    assert main(["verify", str(source), str(packed)]) == 0
    assert main(["unpack", str(packed), str(plain)]) == 0
    before, after, back = load_file(source / "model.safetensors"), read_stored(packed), read_stored(plain)
    assert {parse_packed_name(name) is None for name in after if ".layers.2.mlp.experts." in name} == {False}
    assert before.keys() == back.keys()
    for name in names:
        assert torch.equal(before[name], after[name])
        assert torch.equal(before[name], back[name])


def test_no_more_such_layers_than_the_config_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = build_tiny("deepseek_v3", tmp_path / "source")
    add_mtp_layer(source)
    edit_config(source, num_nextn_predict_layers=0)
    arguments = ["convert", str(source), str(tmp_path / "packed")]
    parts = ("model.layers.3.mlp.experts.0.down_proj", "layer 3", "num_hidden_layers 3 and num_nextn_predict_layers 0")
    assert_refused(arguments, tmp_path, capsys, *parts)


@pytest.mark.parametrize("from_index", [False, True])
@pytest.mark.parametrize(
    ("family", "changes", "parts"),
    [
        ("mixtral", {"num_hidden_layers": 2}, ("is of layer 2", "num_hidden_layers 2;")),
        ("mixtral", {"num_local_experts": 7}, ("is of expert 7", "num_local_experts 7;")),
        ("olmoe", {"num_experts": 6}, ("is of expert 6", "num_experts 6;")),
        ("qwen3_moe", {"decoder_sparse_step": 2}, ("is of layer 0", "only the layers [1] have")),
        ("qwen3_moe", {"mlp_only_layers": [0]}, ("is of layer 0", "only the layers [1, 2] have")),
        ("deepseek_v3", {"first_k_dense_replace": 2}, ("is of layer 1", "only the layers [2] have")),
    ],
)
def test_experts_that_the_config_does_not_have(
    family: str,
    changes: dict[str, object],
    parts: tuple[str, ...],
    from_index: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Their names are as they should be, so it is the config that says something else."""
    source = build_tiny(family, tmp_path / "source")
    edit_config(source, **changes)
    if from_index:
        leave_only_the_index(source, total_size=1 << 20)
        arguments = ["plan", str(source)]
    else:
        arguments = ["convert", str(source), str(tmp_path / "packed")]
    assert_refused(arguments, tmp_path, capsys, "config.json", *parts)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"architectures": ["GptOssForCausalLM"], "quantization_config": {"quant_method": "mxfp4"}},
            ("GptOssForCausalLM", "biases", "MXFP4"),
        ),
        ({"architectures": ["NemotronHForCausalLM"]}, ("NemotronHForCausalLM", "have no gate")),
        ({"architectures": ["LlamaForCausalLM"]}, ("LlamaForCausalLM", "no Mixture of Experts", "vLLM 0.32")),
    ],
)
def test_refused_by_name(
    changes: dict[str, object],
    parts: tuple[str, ...],
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    edit_config(source, **changes)
    assert_refused(["convert", str(source), str(tmp_path / "packed")], tmp_path, capsys, *parts)


def test_weighed_inputs_of_two_experts_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = build_tiny("llama4_text", tmp_path / "source", num_experts_per_tok=2)
    arguments = ["convert", str(source), str(tmp_path / "packed")]
    assert_refused(arguments, tmp_path, capsys, "config.json has num_experts_per_tok 2", "Llama4ForCausalLM")


@pytest.mark.parametrize(
    ("family", "overrides", "layers"),
    [
        ("deepseek_v2", {"first_k_dense_replace": 2}, (2,)),
        ("ernie4_5_moe", {}, (1, 2)),
        ("ernie4_5_moe", {"moe_layer_start_index": 0, "moe_layer_interval": 2}, (1,)),
        ("ernie4_5_moe", {"moe_layer_start_index": 0, "moe_layer_end_index": 1}, (0, 1)),
        ("llama4_text", {}, (1, 3)),
        ("llama4_text", {"interleave_moe_layer_step": 1}, (0, 1, 2, 3)),
    ],
)
def test_layers_with_experts(family: str, overrides: dict[str, int], layers: tuple[int, ...], tmp_path: Path) -> None:
    source = build_tiny(family, tmp_path / "source", **overrides)
    names = by_expert(load_file(source / "model.safetensors"))
    assert {int(name.split(".")[2]) for name in names if ".experts." in name} == set(layers)
    assert main(["convert", str(source), str(tmp_path / "packed"), "--rule", "paper"]) == 0
    packed = read_stored(tmp_path / "packed")
    assert {int(name.split(".")[2]) for name in packed if parse_packed_name(name)} == set(layers)


def test_experts_in_every_second_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """moe_layer_freq, which transformers does not know: its layer 1 would have experts."""
    source = build_tiny("deepseek_v2", tmp_path / "source")

    def make_layer_dense(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.1.mlp.")]:
            del tensors[name]
        for name in ("gate_proj", "up_proj", "down_proj"):
            tensors[f"model.layers.1.mlp.{name}.weight"] = tensors[f"model.layers.0.mlp.{name}.weight"].clone()

    edit_tensors(source, make_layer_dense)
    edit_config(source, moe_layer_freq=2)
    assert main(["convert", str(source), str(tmp_path / "packed")]) == 0
    assert main(["verify", str(source), str(tmp_path / "packed")]) == 0
    (tmp_path / "text").write_text("apples and pears " * 30)
    arguments = ["convert", str(source), str(tmp_path / "other"), "--calibration", str(tmp_path / "text")]
    assert_refused(arguments, tmp_path, capsys, "layer 1 does not fit transformers' own model")
