"""What a model or its configuration asks for and packed experts do not have is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.plugin.checkpoints import Checkpoints
from tests.plugin.engine import running
from vllm_puzzle.format import FormatError
from vllm_puzzle.kernels import EngineError
from vllm_puzzle.plugin.config import PuzzleMoEConfig

# Codes of one width in every layer of a tiny model.
CODES = ("even",) * 3


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


class BuiltError(Exception):
    pass


def assert_built(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only as far as the first layer's method: on one rank nothing could be sent."""

    def build(self: Any, layer: Any, *arguments: Any, **options: Any) -> None:
        raise BuiltError

    monkeypatch.setattr("vllm_puzzle.plugin.method.PuzzleMoEMethod.create_weights", build)
    with pytest.raises(BuiltError), running(model):
        pass


@pytest.mark.parametrize(
    "settings",
    [{"dp_size": 2, "use_ep": True}, {"all2all_backend": "deepep_low_latency"}, {"pcp_size": 2}],
    ids=["data parallel by allgather", "one rank", "context parallel without experts"],
)
def test_what_dispatches_without_such_kernels_is_built(
    settings: dict[str, Any], packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_layers(monkeypatch, lambda layer: set_parallel(layer, **settings))
    assert_built(packed, monkeypatch)


def place_anywhere(layer: Any) -> None:
    set_parallel(layer, enable_eplb=True)
    layer.expert_placement_strategy = "round_robin"


def test_coded_experts_may_be_anywhere(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    change_layers(monkeypatch, place_anywhere)
    assert_built(checkpoints.mixed("qwen3_moe", CODES)[0], monkeypatch)


@pytest.mark.parametrize("kind", ["uneven", "plain"])
def test_experts_of_several_sizes_are_not_balanced(
    kind: str, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where each layer has one size."""
    change_layers(monkeypatch, place_anywhere)
    message = r"layers\.0\..*--enable-eplb\) where experts differ in size or layers in kind .convert again with --even"
    with (
        pytest.raises(NotImplementedError, match=message),
        running(checkpoints.mixed("qwen3_moe", (*CODES[1:], kind))[0]),
    ):
        pass


def test_plain_experts_on_several_ranks(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own kernels would read past the weights of one."""
    change_layers(monkeypatch, lambda layer: set_parallel(layer, use_ep=True))
    message = r"layers\.0\..* does not support expert parallelism of plain experts on a CPU; leave out"
    model, _ = checkpoints.mixed("qwen3_moe", ("plain", *CODES[1:]))
    with pytest.raises(NotImplementedError, match=message), running(model):
        pass


def test_ranks_that_would_split_a_pair(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = json.loads((packed / "config.json").read_text())["quantization_config"]["layers"][0]["experts"][0]
    here = torch.full((8,), -1, dtype=torch.int32)
    here[first] = 0
    manager = SimpleNamespace(expert_map=here, num_fused_shared_experts=0)
    change_layers(monkeypatch, lambda layer: setattr(layer, "expert_map_manager", manager))
    message = f"only expert {first} on this rank; use a number of ranks that divides 2"
    with pytest.raises(FormatError, match=message), running(packed):
        pass


def test_an_engine_that_cannot_compute_the_dtype_is_refused(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PUZZLE_CPU_ISA", "avx2")
    with pytest.raises(EngineError, match="the model runs in float32; choose auto"), running(packed, dtype="float32"):
        pass
