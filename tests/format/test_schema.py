"""The schema: strict on write and on load, with one sentence for whatever is wrong; and the names it implies."""

import copy
import json
from typing import Any

import pytest

from vllm_puzzle.format import (
    Calibration,
    FormatError,
    LayerCodes,
    LayerSlots,
    Provenance,
    PuzzleMoEQuantizationConfig,
    check_packed_names,
    coded_tensors,
    layer_index,
    packed_name,
    parse_packed_name,
)


def quantization() -> PuzzleMoEQuantizationConfig:
    return PuzzleMoEQuantizationConfig(
        num_experts=8,
        hidden_size=64,
        intermediate_size=32,
        max_expert_parallel=2,
        layers=[
            LayerSlots(layer=1, experts=[3, 0, 1, 2, 7, 4, 5, 6], pairs=4),
            LayerSlots(layer=2, experts=[3, 0, 1, 2, 7, 4, 5, 6], pairs=1),
        ],
        provenance=Provenance(
            rule="paper",
            tau=0.4,
            align=False,
            pairing="random",
            compression=50.0,
            seed=0,
            calibration=Calibration(source="c4.utf8", sha256="00", sequences=8, sequence_length=2048),
            source_sha256="00",
            tool_version="0.1.0",
        ),
    )


def mixed() -> PuzzleMoEQuantizationConfig:
    """Layers of pairs, of codes and plain ones in one checkpoint."""
    pairs = quantization()
    return PuzzleMoEQuantizationConfig(
        format_version=2,
        num_experts=8,
        hidden_size=64,
        intermediate_size=32,
        max_expert_parallel=2,
        layers=pairs.layers,
        coded_layers=[
            LayerCodes.even(3, 8, 6),
            LayerCodes(layer=4, w13_bits=[4, 5, 6, 8, 4, 4, 4, 4], w2_bits=[4] * 8),
        ],
        plain_layers=[0],
        provenance=pairs.provenance,
    )


def mixed_names() -> list[str]:
    prefix = "model.layers.{}.mlp.experts"
    projections = ("gate_proj", "up_proj", "down_proj")
    coded = [
        tensor.name
        for layer in (3, 4)
        for expert in range(8)
        for tensor in coded_tensors(prefix.format(layer), expert, projections)
    ]
    return [*names(), *coded, *(f"{prefix.format(0)}.{expert}.up_proj.weight" for expert in range(8))]


def names() -> list[str]:
    return ["model.norm.weight"] + [
        packed_name(f"model.layers.{slots.layer}.mlp.experts", slots.first_member(slot), projection)
        for slots in quantization().layers
        for slot in range(slots.num_slots)
        for projection in ("gate_proj", "up_proj", "down_proj")
    ]


def test_it_survives_config_json() -> None:
    written = json.loads(json.dumps(quantization().model_dump()))
    assert PuzzleMoEQuantizationConfig.parse(written) == quantization()
    assert (written["quant_method"], written["format_version"], written["bits"]) == ("puzzlemoe", 1, 16)


def test_version_1_is_written_as_it_was() -> None:
    written = quantization().to_json()
    assert "coded_layers" not in written
    assert "bits" not in written["provenance"]
    assert PuzzleMoEQuantizationConfig.parse(json.loads(json.dumps(written))) == quantization()


def test_layers_of_every_kind_in_one_checkpoint() -> None:
    written = json.loads(json.dumps(mixed().to_json()))
    assert PuzzleMoEQuantizationConfig.parse(written) == mixed()
    assert (mixed().layer(1), mixed().coded_layer(3)) == (quantization().layers[0], LayerCodes.even(3, 8, 6))
    assert [mixed().layer(0), mixed().coded_layer(0), mixed().coded_layer(1), mixed().layer(3)] == [None] * 4
    assert [codes.is_even for codes in mixed().coded_layers] == [True, False]
    check_packed_names(mixed_names(), mixed(), "m")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format_version"], 1, "`coded_layers` and `plain_layers` take format_version 2"),
        (["coded_layers", 0, "w13_bits"], [7] * 8, "layer 3: codes of 7 bits are not known"),
        (["coded_layers", 0, "w13_bits"], [4] * 7, "layer 3: `w13_bits` is of 7 experts, `w2_bits` of 8"),
        (["num_experts"], 4, "layer 1 lists 8 experts, the checkpoint has 4"),
        (["coded_layers", 0, "layer"], 1, "layer 1 is in more than one of `layers`, `coded_layers`, `plain_layers`"),
        (["plain_layers"], [5, 0], "`plain_layers` must be in ascending order"),
    ],
)
def test_what_is_wrong_with_coded_layers_is_named(path: list[Any], value: Any, message: str) -> None:
    config: Any = json.loads(json.dumps(mixed().to_json()))
    target = config
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(FormatError, match=message):
        PuzzleMoEQuantizationConfig.parse(config)


@pytest.mark.parametrize(
    "tensor",
    ["3.mlp.experts.5.gate_proj.weight_codebook", "4.mlp.experts.0.up_proj.weight_scale"],
)
def test_a_missing_tensor_of_a_coded_expert_is_named(tensor: str) -> None:
    lost = f"model.layers.{tensor}"
    with pytest.raises(FormatError, match=f"m: packed tensor {lost} is missing"):
        check_packed_names([name for name in mixed_names() if name != lost], mixed(), "m")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("3.mlp.experts.8.up_proj.weight_scale", "layer 3 has no expert 8"),
        ("1.mlp.experts.3.up_proj.weight_scale", "layer 1 has no coded experts"),
        ("3.mlp.experts.3.up_proj.weight", "is an expert tensor that is not packed"),
        ("3.mlp.experts.3.up_proj.weight_packed", "a coded expert has no such tensor"),
    ],
)
def test_an_unexpected_tensor_beside_coded_experts_is_named(tensor: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        check_packed_names([*mixed_names(), f"model.layers.{tensor}"], mixed(), "m")


def test_a_rule_without_a_tau_says_so() -> None:
    config = quantization().model_dump()
    config["provenance"] |= {"rule": "compensated", "tau": None, "align": True, "pairing": "loss"}
    provenance = PuzzleMoEQuantizationConfig.parse(json.loads(json.dumps(config))).provenance
    assert (provenance.rule, provenance.tau, provenance.align, provenance.pairing) == (
        "compensated",
        None,
        True,
        "loss",
    )


@pytest.mark.parametrize("field", ["rule", "tau", "align", "pairing"])
def test_how_it_was_made_is_told_in_full(field: str) -> None:
    config = quantization().model_dump()
    del config["provenance"][field]
    with pytest.raises(FormatError, match=f"provenance.{field}: Field required"):
        PuzzleMoEQuantizationConfig.parse(config)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format_version"], 3, "format_version 3, this vllm-puzzle reads versions 1 and 2"),
        (["bits"], 8, "bits: Input should be 16"),
        (["num_experts"], "8", "num_experts: Input should be a valid integer"),
        (["num_experts"], 9, "9 experts do not divide evenly among 2 ranks"),
        (["num_experts"], 16, "layer 1 lists 8 experts, the checkpoint has 16"),
        (["max_expert_parallel"], 3, "do not divide evenly among 3 ranks"),
        (["max_expert_parallel"], 8, "experts 3 and 0 share slot 0 but belong to different ranks .1 to a rank."),
        (["hidden_size"], 0, "hidden_size: Input should be greater than 0"),
        (["layers", 0, "experts"], [0, 4, 1, 2, 3, 5, 6, 7], "experts 0 and 4 share slot 0 but belong to different"),
        (["layers", 0, "layer"], 2, "ascending order without repetition"),
        (["layers", 0, "extra"], 1, "Extra inputs are not permitted"),
        (["provenance", "tau"], "0.4", "provenance.tau: Input should be a valid number"),
        (["provenance", "align"], None, "provenance.align: Input should be a valid boolean"),
        (["provenance", "pairing"], None, "provenance.pairing: Input should be a valid string"),
    ],
)
def test_what_is_wrong_is_named(path: list[Any], value: Any, message: str) -> None:
    config = copy.deepcopy(quantization().model_dump())
    target: Any = config
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(FormatError, match=message) as caught:
        PuzzleMoEQuantizationConfig.parse(config, "m/config.json")
    assert str(caught.value).startswith("m/config.json")
    assert "\n" not in str(caught.value)


def test_names_are_read_as_they_are_written() -> None:
    name = packed_name("model.layers.10.block_sparse_moe.experts", 3, "w1")
    assert name == "model.layers.10.block_sparse_moe.experts.3.w1.weight_packed"
    assert parse_packed_name(name) == ("model.layers.10.block_sparse_moe.experts", 3, "w1")
    assert layer_index(name) == 10
    assert parse_packed_name("model.layers.0.mlp.experts.3.w1.weight") is None
    assert layer_index("lm_head.weight") is None
    # Whatever comes before the layers.
    assert layer_index("language_model.model.layers.7.mlp.experts") == layer_index("layers.7.ffn") == 7
    # Of a part for multi-token prediction beside the model.
    assert layer_index("mtp.layers.0.mlp.experts") is layer_index("model.mtp.layers.0.mlp.experts") is None


def test_complete_names_pass() -> None:
    check_packed_names(names(), quantization(), "m")


@pytest.mark.parametrize(
    "extra",
    [
        "model.layers.3.mlp.experts.0.up_proj.weight",
        "mtp.layers.1.mlp.experts.0.w1.weight",
        "model.layers.1.mlp.experts.e_score_correction_bias",
        # Beside the model that the packed ones are of.
        "talker.model.layers.1.mlp.experts.0.up_proj.weight",
    ],
)
def test_plain_experts_outside_the_packed_layers_pass(extra: str) -> None:
    check_packed_names([*names(), extra], quantization(), "m")


def test_a_missing_packed_tensor_is_named() -> None:
    lost = "model.layers.2.mlp.experts.5.up_proj.weight_packed"
    with pytest.raises(FormatError, match=f"m: packed tensor {lost} is missing"):
        check_packed_names([name for name in names() if name != lost], quantization(), "m")


@pytest.mark.parametrize(
    "extra",
    [
        "model.layers.1.mlp.experts.0.up_proj.weight_packed",
        "model.layers.1.mlp.experts.8.up_proj.weight_packed",
        "model.layers.0.mlp.experts.3.up_proj.weight_packed",
        "model.layers.1.mlp.experts.3.up_proj.weight",
        "model.layers.1.mlp.experts.3.up_proj.weight_scale",
    ],
)
def test_an_unexpected_expert_tensor_is_named(extra: str) -> None:
    with pytest.raises(FormatError, match=extra.replace(".", r"\.")):
        check_packed_names([*names(), extra], quantization(), "m")
