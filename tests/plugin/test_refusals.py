"""What the plugin refuses, and what it says: broken checkpoints, features it lacks, a vLLM it does not know."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vllm_puzzle.plugin.versions
from tests.plugin.engine import running
from tests.tiny import build_tiny
from vllm_puzzle.format import FormatError, LayerSlots
from vllm_puzzle.kernels import EngineError
from vllm_puzzle.plugin import register
from vllm_puzzle.plugin.loader import PackedExpertLoader

SHARD = "model-00003-of-00004.safetensors"


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return copytree(packed, tmp_path / "copy")


def edit_config(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((path / "config.json").read_text())
    edit(config)
    (path / "config.json").write_text(json.dumps(config))


def edit_shard(path: Path, edit: Callable[[dict[str, torch.Tensor]], None], follow: bool) -> None:
    """Changes the shard of layer 1; with `follow` the index tells of it, without it claims the old names."""
    tensors = load_file(path / SHARD)
    old = set(tensors)
    edit(tensors)
    save_file(tensors, path / SHARD, {"format": "pt"})
    if follow:
        index = json.loads((path / "model.safetensors.index.json").read_text())
        for name in old - set(tensors):
            del index["weight_map"][name]
        index["weight_map"].update(dict.fromkeys(tensors, SHARD))
        (path / "model.safetensors.index.json").write_text(json.dumps(index))


def a_packed_name(path: Path) -> str:
    return min(name for name in load_file(path / SHARD) if name.endswith("w3.weight_packed"))


@pytest.mark.parametrize("follow", [True, False])
def test_a_missing_tensor_is_named(copy: Path, follow: bool) -> None:
    name = a_packed_name(copy)
    edit_shard(copy, lambda tensors: tensors.pop(name), follow)
    expert = name.split(".experts.")[1]
    with pytest.raises(ValueError, match=expert), running(copy):
        pass


@pytest.mark.parametrize("new", ["99.w1.weight_packed", "{mate}.w1.weight_packed", "0.w1.weight"])
def test_an_unexpected_tensor_is_named(copy: Path, new: str) -> None:
    slots = json.loads((copy / "config.json").read_text())["quantization_config"]["layers"][1]
    name = f"model.layers.1.block_sparse_moe.experts.{new.format(mate=slots['experts'][1])}"
    edit_shard(copy, lambda tensors: tensors.update({name: torch.zeros(40, 96, dtype=torch.int16)}), follow=True)
    with pytest.raises(ValueError, match=name.split("experts.")[1]), running(copy):
        pass


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(40, 95, dtype=torch.int16), r"\[40, 95\], this model needs torch.int16 \[40, 96\]"),
        (torch.zeros(40, 96, dtype=torch.bfloat16), r"torch.bfloat16 \[40, 96\], this model needs torch.int16"),
    ],
)
def test_a_tensor_of_another_shape_or_type(copy: Path, wrong: torch.Tensor, message: str) -> None:
    name = a_packed_name(copy)
    edit_shard(copy, lambda tensors: tensors.update({name: wrong}), follow=True)
    with pytest.raises(FormatError, match=message), running(copy):
        pass


def test_a_broken_section_in_the_config(copy: Path) -> None:
    edit_config(copy, lambda config: config["quantization_config"]["layers"][0]["experts"].reverse())
    edit_config(copy, lambda config: config["quantization_config"].update(bits=8))
    with pytest.raises(ValueError, match="bits: Input should be 16"), running(copy):
        pass


def test_a_layer_that_is_not_listed(copy: Path) -> None:
    edit_config(copy, lambda config: config["quantization_config"]["layers"].pop())
    with pytest.raises(ValueError, match=r"layers\.2\..*unexpected"), running(copy):
        pass


def test_sizes_that_are_not_the_models(copy: Path) -> None:
    edit_config(copy, lambda config: config["quantization_config"].update(intermediate_size=80))
    with pytest.raises(FormatError, match="intermediate_size 40, quantization_config says 96 and 80"), running(copy):
        pass


def test_a_model_that_is_not_packed(tmp_path: Path) -> None:
    source = build_tiny("mixtral", tmp_path / "source")
    with (
        pytest.raises(ValueError, match=r"not packed.*vllm_puzzle\.convert"),
        running(source, quantization="puzzlemoe"),
    ):
        pass


def test_another_quantization_than_the_checkpoints(packed: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"\(puzzlemoe\) does not match .*\(fp8\)"),
        running(packed, quantization="fp8"),
    ):
        pass


def test_a_decoder_layer_without_slots(packed: Path, tmp_path: Path) -> None:
    """Where the names of tensors are not at hand, as of a model on the hub."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((packed / name).read_text())
    edit_config(tmp_path, lambda config: config["quantization_config"]["layers"].pop())
    message = r"layers\.2\..*packs layers \[0, 1\] only"
    with pytest.raises(FormatError, match=message), running(tmp_path, load_format="dummy"):
        pass


@pytest.mark.parametrize("load_format", ["sharded_state", "runai_streamer_sharded"])
def test_what_an_engine_saved_is_not_loaded(load_format: str, packed: Path) -> None:
    message = f"does not support --load-format {load_format} .use auto, or runai_streamer, with the packed checkpoint"
    with pytest.raises(NotImplementedError, match=message), running(packed, load_format=load_format):
        pass


def test_a_running_engine_is_not_saved(packed: Path, tmp_path: Path) -> None:
    message = r"layers\.0\..* does not support saving the weights of a running engine \(save_sharded_state\)"
    with running(packed) as llm:
        with pytest.raises(NotImplementedError, match=message):
            llm.llm_engine.engine_core.save_sharded_state(path=str(tmp_path), pattern=None, max_size=None)
        assert not list(tmp_path.iterdir())


def set_parallel(layer: Any, **settings: Any) -> None:
    for name, value in settings.items():
        setattr(layer.moe_config.moe_parallel_config, name, value)


# Features whose configurations no tiny model on one CPU can reach are set on the layer that vLLM hands to the method.
LAYER_FEATURES: dict[str, tuple[Callable[[Any], None], str]] = {
    "biases": (lambda layer: setattr(layer.moe_config, "has_bias", True), "biases in the experts"),
    "interleaved": (
        lambda layer: setattr(layer, "activation", type(layer.activation).SWIGLUOAI),
        "activation swigluoai",
    ),
    "swiglu limit": (lambda layer: setattr(layer, "swiglu_limit", 7.0), "SwiGLU limit"),
    "eplb": (
        lambda layer: setattr(layer.moe_config.moe_parallel_config, "enable_eplb", True),
        r"load balancing \(--enable-eplb\)",
    ),
    "round robin": (lambda layer: setattr(layer, "expert_placement_strategy", "round_robin"), "round-robin"),
    "all2all kernels": (
        lambda layer: set_parallel(layer, dp_size=2, all2all_backend="deepep_low_latency"),
        r"--all2all-backend deepep_low_latency with data or sequence parallelism \(use allgather_reducescatter\)",
    ),
    "all2all kernels without expert parallelism": (
        lambda layer: set_parallel(layer, dp_size=2, use_ep=False, all2all_backend="passthrough"),
        "--all2all-backend passthrough",
    ),
    "all2all kernels for sequences": (
        lambda layer: set_parallel(layer, sp_size=2, use_ep=True, all2all_backend="deepep_high_throughput"),
        "--all2all-backend deepep_high_throughput",
    ),
    "prefill context parallel": (
        lambda layer: set_parallel(layer, pcp_size=2, use_ep=True),
        "expert parallelism over prefill context parallel ranks",
    ),
    "fused shared experts": (
        lambda layer: setattr(layer.expert_map_manager, "num_fused_shared_experts", 1),
        "shared experts fused",
    ),
}


def change_layers(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]) -> None:
    """Applies `change` to every layer of experts before the method is made for it."""
    from vllm_puzzle.plugin.config import PuzzleMoEConfig

    original = PuzzleMoEConfig.get_quant_method

    def with_feature(self: PuzzleMoEConfig, layer: torch.nn.Module, prefix: str) -> Any:
        if hasattr(layer, "moe_config"):
            change(layer)
        return original(self, layer, prefix)

    monkeypatch.setattr(PuzzleMoEConfig, "get_quant_method", with_feature)


@pytest.mark.parametrize("feature", LAYER_FEATURES)
def test_features_of_a_layer(feature: str, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, message = LAYER_FEATURES[feature]
    change_layers(monkeypatch, change)
    message = rf"layers\.0\..*puzzlemoe does not support .*{message}"
    with pytest.raises(NotImplementedError, match=message), running(packed):
        pass


@pytest.mark.parametrize(
    "settings",
    [{"dp_size": 2, "use_ep": True}, {"all2all_backend": "deepep_low_latency"}, {"pcp_size": 2}],
    ids=["data parallel by allgather", "one rank", "context parallel without experts"],
)
def test_what_dispatches_without_such_kernels_is_built(
    settings: dict[str, Any], packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only as far as the first layer's method: on one rank nothing could be sent."""

    class BuiltError(Exception):
        pass

    def build(self: Any, layer: Any, *arguments: Any, **options: Any) -> None:
        raise BuiltError

    monkeypatch.setattr("vllm_puzzle.plugin.method.PuzzleMoEMethod.create_weights", build)
    change_layers(monkeypatch, lambda layer: set_parallel(layer, **settings))
    with pytest.raises(BuiltError), running(packed):
        pass


def test_ranks_that_would_split_a_pair(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = json.loads((packed / "config.json").read_text())["quantization_config"]["layers"][0]["experts"][0]
    here = torch.full((8,), -1, dtype=torch.int32)
    here[first] = 0
    change_layers(monkeypatch, lambda layer: setattr(layer.expert_map_manager, "_expert_map", here))
    message = f"only expert {first} on this rank; use a number of ranks that divides 2"
    with pytest.raises(FormatError, match=message), running(packed):
        pass


def make_loader(local_slots: list[int] | None = None, tp_rank: int = 0, tp_size: int = 1) -> PackedExpertLoader:
    slots = LayerSlots(layer=0, experts=[1, 0, 2, 3], pairs=1)
    return PackedExpertLoader(
        layer_name="model.layers.0.mlp.experts",
        slots=slots,
        local_slots=slots.local_slots() if local_slots is None else local_slots,
        projections={"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"},
        full_shapes={"w1": (4, 6), "w3": (4, 6), "w2": (6, 4)},
        tp_rank=tp_rank,
        tp_size=tp_size,
    )


def parameter(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(shape, dtype=torch.int16), requires_grad=False)


def test_tensor_parallel_ranks_load_their_own_rows_and_columns() -> None:
    gate, up, down = (torch.arange(24, dtype=torch.int16).view(4, 6) + 100 * i for i in range(3))
    down = down.reshape(6, 4)
    for rank in (0, 1):
        loader, w13, w2 = make_loader(tp_rank=rank, tp_size=2), parameter(3, 4, 6), parameter(3, 6, 2)
        for weight, shard, target in ((gate, "w1", w13), (up, "w3", w13), (down, "w2", w2)):
            # Positionally, as vLLM's older models call it.
            assert loader(target, weight, "name", shard, 2, True)
        mine = slice(2 * rank, 2 * rank + 2)
        assert torch.equal(w13[1], torch.cat([gate[mine], up[mine]]))
        assert torch.equal(w2[1], down[:, mine])
        assert not w13[[0, 2]].any()


def test_padding_is_zero_whatever_was_there() -> None:
    """On a reload the padded parameters hold words in tile order, zero or not where this rank's part ends."""
    gate, up, down = (torch.arange(24, dtype=torch.int16).view(4, 6) + 100 * i for i in range(3))
    down = down.reshape(6, 4)
    for rank in (0, 1):
        loader, w13, w2 = make_loader(tp_rank=rank, tp_size=2), parameter(3, 64, 32), parameter(3, 32, 32)
        w13.fill_(7)
        w2.fill_(7)
        for weight, shard, target in ((gate, "w1", w13), (up, "w3", w13), (down, "w2", w2)):
            assert loader(target, weight, "name", shard, 2, True)
        mine = slice(2 * rank, 2 * rank + 2)
        expected13, expected2 = torch.zeros(64, 32, dtype=torch.int16), torch.zeros(32, 32, dtype=torch.int16)
        expected13[:2, :6], expected13[32:34, :6], expected2[:6, :2] = gate[mine], up[mine], down[:, mine]
        assert torch.equal(w13[1], expected13)
        assert torch.equal(w2[1], expected2)


def test_an_expert_parallel_rank_counts_its_own_slots_only() -> None:
    loader, w13, w2 = make_loader(local_slots=[1]), parameter(1, 8, 6), parameter(1, 6, 4)
    gate, down = torch.ones(4, 6, dtype=torch.int16), torch.ones(6, 4, dtype=torch.int16)
    assert loader(w13, gate, "name", "w1", 1, return_success=True) is False
    assert loader(w13, gate, "name", "w1", 2, return_success=True) is True
    with pytest.raises(FormatError, match=r"2 of 3 packed tensors .*experts\.2\.up_proj.*experts\.2\.down_proj"):
        loader.finish()
    with pytest.raises(FormatError, match=r"experts\.2\.gate_proj.* more than once"):
        loader(w13, gate, "name", "w1", 2)
    with pytest.raises(FormatError, match=r"experts\.0\.gate_proj.* is unexpected"):
        loader(w13, gate, "name", "w1", 0)
    loader(w13, gate, "name", "w3", 2)
    loader(w2, down, "name", "w2", 2)
    loader.finish()
    # A reload starts over.
    assert loader(w13, gate, "name", "w1", 2, return_success=True) is True


def test_an_engine_that_cannot_compute_the_dtype_is_refused(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PUZZLE_CPU_ISA", "avx2")
    with pytest.raises(EngineError, match="the model runs in float32; choose auto"), running(packed, dtype="float32"):
        pass


def test_a_weight_that_float16_cannot_hold_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = a_packed_name(copy)
    # Member 0 alone, exponent 31: 2**15.
    edit_shard(copy, lambda tensors: tensors[name][3].fill_(1 << 13 | 31 << 7), follow=True)
    monkeypatch.setenv("VLLM_PUZZLE_ENGINE", "triton")
    expert = name.split(".experts.")[1].split(".")[0]
    message = rf"layers\.1\..*w13_weight_packed has .* 32768 or more in the slot of expert {expert}, which float16"
    with pytest.raises(FormatError, match=message), running(copy, dtype="float16"):
        pass


def test_registering_twice_changes_nothing() -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    register()
    register()
    assert QUANTIZATION_METHODS.count("puzzlemoe") == 1
    assert get_quantization_config("puzzlemoe").__name__ == "PuzzleMoEConfig"


def test_an_unsupported_vllm_is_told_and_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vllm.__version__", "0.31.2")
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.ERROR):
        register()
    assert "found 0.31.2; install 'vllm-puzzle[cuda]'" in caplog.text
    with pytest.raises(vllm_puzzle.plugin.versions.UnsupportedVLLMError):
        vllm_puzzle.plugin.versions.check_vllm()


def run(program: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_a_missing_vllm_says_what_to_install() -> None:
    blocked = "import sys; sys.modules['vllm'] = None\n"
    result = run(blocked + "from vllm_puzzle.plugin import register; register()")
    assert "vllm-puzzle serves through vLLM" in result.stderr
    assert "'vllm-puzzle[cpu]' for machines without a GPU" in result.stderr


def test_importing_the_package_is_free() -> None:
    heavy = (
        "import sys, vllm_puzzle; print([m for m in ('vllm', 'triton', 'torch', 'transformers') if m in sys.modules])"
    )
    assert run(heavy).stdout == "[]\n"
    offline = "import sys, vllm_puzzle.offline.conversion.convert; print('vllm' in sys.modules)"
    assert run(offline).stdout == "False\n"
