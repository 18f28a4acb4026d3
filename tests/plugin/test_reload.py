"""Reloading weights into a running engine: other words and codes, other slots and widths, and what is left after a
reload that fails.

The first layer of each model holds pairs, the others codes. Plain layers are vLLM's own, which cannot load them again
on a CPU where their size is none that its kernels take.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.coded import store_layers
from tests.plugin.checkpoints import edit_config, mix
from tests.plugin.engine import generate, running
from tests.tiny import NUM_EXPERTS, build_tiny, remove_tensors
from vllm_puzzle.cli import main
from vllm_puzzle.format import LayerCodes

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6]]


def pack(source: Path, packed: Path, *options: str) -> Path:
    assert main(["convert", str(source), str(packed), "--rule", "paper", *options]) == 0
    mix(source, packed, kinds=("pairs", "uneven", "even"))
    return packed


def with_other_weights(packed: Path, other: Path) -> Path:
    """The same slots and widths, all weights of the other sign, and another embedding."""
    copytree(packed, other)
    for shard in other.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            if name.endswith("weight_scale"):
                tensors[name] = -tensor
            elif tensor.dtype == torch.int16:
                signs, masks = (tensor ^ -1) & -16384, (tensor & 12288) << 2
                tensors[name] = (tensor & 16383) | (signs & masks)
            elif "embed_tokens" in name:
                tensors[name] = tensor.flip(0).contiguous()
        save_file(tensors, shard, {"format": "pt"})
    return other


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reload")
    source = build_tiny("qwen3_moe", folder / "source")
    packed = pack(source, folder / "packed")
    widths = pack(source, folder / "widths")
    store_layers(widths, source, {1: LayerCodes.even(1, NUM_EXPERTS, 8)})
    plain = pack(source, folder / "plain")
    store_layers(plain, source, {1: None})
    pairs = folder / "pairs alone"
    assert main(["convert", str(source), str(pairs), "--rule", "paper"]) == 0
    return {
        "source": source,
        "pairs alone": pairs,
        "other pairs alone": with_other_weights(pairs, folder / "other pairs alone"),
        "packed": packed,
        "other": with_other_weights(packed, folder / "other"),
        "other widths": widths,
        "more plain layers": plain,
        "other pairs": pack(source, folder / "pairs", "--seed", "7"),
        "fewer pairs": pack(source, folder / "fewer", "--compression", "25"),
    }


def tokens(llm: Any) -> list[list[int]]:
    llm.reset_prefix_cache()
    return [greedy.tokens for greedy in generate(llm, PROMPTS, 12)]


def reload(llm: Any, **arguments: Any) -> None:
    llm.collective_rpc("reload_weights", kwargs=arguments)


ENGINES = {"cpu": {"dtype": "bfloat16"}, "reference": {"dtype": "float32"}}
# The interpreter is slow, and vLLM warms up with as many tokens as may come at once.
SMALL = {"dtype": "float16", "max_num_batched_tokens": 16, "max_model_len": 16, "max_num_seqs": 2}


@pytest.mark.parametrize("engine", ENGINES)
def test_other_weights_and_back(engine: str, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PUZZLE_ENGINE", engine)
    with running(models["other"], **ENGINES[engine]) as llm:
        of_other = tokens(llm)
    with running(models["packed"], **ENGINES[engine]) as llm:
        before = tokens(llm)
        assert before != of_other
        reload(llm)
        assert tokens(llm) == before
        reload(llm, weights_path=str(models["other"]))
        assert tokens(llm) == of_other
        reload(llm, weights_path=str(models["packed"]))
        assert tokens(llm) == before


def test_a_replaced_folder(models: dict[str, Path], tmp_path: Path) -> None:
    served = copytree(models["packed"], tmp_path / "served")
    with running(served, dtype="float32") as llm:
        before = tokens(llm)
        for model in ("other", "packed"):
            rmtree(served)
            copytree(models[model], served)
            reload(llm)
            assert (tokens(llm) == before) == (model == "packed")


@pytest.mark.parametrize("engine", ENGINES)
def test_other_slots_are_refused_and_the_engine_runs_on(
    engine: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PUZZLE_ENGINE", engine)
    short = copytree(models["other"], tmp_path / "short")
    index = json.loads((short / "model.safetensors.index.json").read_text())
    lost = next(name for name in index["weight_map"] if name.endswith("up_proj.weight_scale"))
    shard = short / index["weight_map"].pop(lost)
    (short / "model.safetensors.index.json").write_text(json.dumps(index))
    # vLLM reads all that a shard holds, whatever the index says.
    save_file({name: tensor for name, tensor in load_file(shard).items() if name != lost}, shard, {"format": "pt"})
    dense = [f"model.{name}.weight" for name in ("layers.1.self_attn.q_proj", "layers.1.self_attn.o_proj", "norm")]
    for name in (*dense, "lm_head.weight"):
        remove_tensors(copytree(models["other"], tmp_path / name), {name})
    family = copytree(models["other"], tmp_path / "family")
    edit_config(family, lambda config: config.update(architectures=["MixtralForCausalLM"], model_type="mixtral"))
    refused = {
        "other pairs": "pairs cannot be reloaded into the running model, .*: slot 0 of layer 0 holds experts .* there",
        "fewer pairs": r"fewer cannot be reloaded .*layer \d has \d pairs of 8 experts there and 4 of 8 in the running",
        "other widths": r"the codes of expert 0 of layer 1 have 8 and 8 bits there and 4 and 6 in the running model",
        "more plain layers": r"layers \[2\] have codes there and layers \[1, 2\] in the running model",
        "source": "source/config.json has no quantization_config, so its experts are not packed",
        "short": lost.split("experts.")[1],
        "nowhere": "nowhere cannot be reloaded: there is no config.json",
        "family": "its architecture is MixtralForCausalLM there and Qwen3MoeForCausalLM in the running model",
        **{name: f"lacks 1 tensor that the model of config.json needs: {name}" for name in (*dense, "lm_head.weight")},
    }
    with running(models["packed"], **ENGINES[engine]) as llm:
        before = tokens(llm)
        for model, message in refused.items():
            with pytest.raises(Exception, match=message):
                reload(llm, weights_path=str(models.get(model, tmp_path / model)))
            assert tokens(llm) == before, model
        # What was refused is not what runs.
        reload(llm)
        assert tokens(llm) == before
        # Also after a reload that went well.
        reload(llm, weights_path=str(models["packed"]))
        with pytest.raises(Exception, match="cannot be reloaded into the running model"):
            reload(llm, weights_path=str(models["other pairs"]))
        assert tokens(llm) == before


def tensors_of(path: Path) -> list[tuple[str, torch.Tensor]]:
    return [item for shard in sorted(path.glob("*.safetensors")) for item in load_file(shard).items()]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_reload_that_ends_halfway_computes_nothing_until_the_next(
    engine: str, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a trainer sends weights: nothing says beforehand that some are missing, or none of this model's."""
    monkeypatch.setenv("VLLM_PUZZLE_ENGINE", engine)
    whole = tensors_of(models["other"])
    first, mate = json.loads((models["other"] / "config.json").read_text())["quantization_config"]["layers"][0][
        "experts"
    ][:2]
    pair = f"layers.0.mlp.experts.{first}."
    strange = [(name.replace(pair, f"layers.0.mlp.experts.{mate}."), tensor) for name, tensor in whole]
    spoiled = []
    for end in (f"{pair}down_proj.weight_packed", "layers.1.mlp.experts.7.down_proj.weight_packed"):
        lost = next(name for name, _ in whole if name.endswith(end))
        spoiled += [
            ([(name, tensor) for name, tensor in whole if name != lost], lost),
            ([(name, tensor[1:] if name == lost else tensor) for name, tensor in whole], "this model needs"),
        ]
    # Not the first: what is refused while weights come is taken back where they had been loaded from disk.
    spoiled.append((strange, "is unexpected"))
    with running(models["other"], **ENGINES[engine]) as llm:
        of_other = tokens(llm)
    with running(models["packed"], **ENGINES[engine]) as llm:
        for weights, message in spoiled:
            with pytest.raises(Exception, match=message):
                reload(llm, weights_iterator=iter(weights))
            with pytest.raises(Exception, match=r"reloading them failed; load them again"):
                llm.collective_rpc("execute_dummy_batch")
            reload(llm, weights_iterator=iter(whole))
            assert tokens(llm) == of_other


def spoiled(model: Path, folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy with other tensors in its last shard, whose names and shapes do not say so beforehand."""
    copytree(model, folder)
    shard = max(folder.glob("*.safetensors"))
    tensors = load_file(shard)
    edit(tensors)
    save_file(tensors, shard, {"format": "pt"})
    return folder


def words_as_floats(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({name: words.float() for name, words in tensors.items() if name.endswith("weight_packed")})


def ending(weights: list[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    yield from weights
    raise RuntimeError("the trainer is gone")


@pytest.mark.parametrize("engine", ENGINES)
def test_after_an_error_the_weights_before_it_run_on(
    engine: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of vLLM or of ours, also where weights had been copied; those that a trainer sent cannot be had again."""
    monkeypatch.setenv("VLLM_PUZZLE_ENGINE", engine)
    strange = spoiled(models["other"], tmp_path / "strange", lambda tensors: tensors.update(strange=torch.zeros(1)))
    floats = spoiled(models["other"], tmp_path / "floats", words_as_floats)
    whole = tensors_of(models["other"])
    with running(models["packed"], **ENGINES[engine]) as llm:
        before = tokens(llm)
        for model, message in ((strange, "no module or parameter named 'strange'"), (floats, "this model needs")):
            with pytest.raises(Exception, match=message):
                reload(llm, weights_path=str(model))
            assert tokens(llm) == before
        with pytest.raises(Exception, match="the trainer is gone"):
            reload(llm, weights_iterator=ending([]))
        assert tokens(llm) == before
        with pytest.raises(Exception, match="the trainer is gone"):
            reload(llm, weights_iterator=ending(whole[: len(whole) // 2]))
        assert tokens(llm) == before
        reload(llm, weights_path=str(models["other"]))
        of_other = tokens(llm)
        assert of_other != before
        with pytest.raises(Exception, match="no module or parameter"):
            reload(llm, weights_path=str(strange))
        assert tokens(llm) == of_other
        reload(llm, weights_iterator=iter(tensors_of(models["packed"])))
        assert tokens(llm) == before
        with pytest.raises(Exception, match="the trainer is gone"):
            reload(llm, weights_iterator=ending(whole[: len(whole) // 2]))
        for _ in range(2):
            with pytest.raises(Exception, match=r"reloading them failed; load them again"):
                llm.collective_rpc("execute_dummy_batch")
            with pytest.raises(Exception, match="cannot be reloaded into the running model"):
                reload(llm, weights_path=str(models["other pairs"]))
        reload(llm, weights_iterator=iter(whole))
        assert tokens(llm) == of_other


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="compiled kernels are served in tests/gpu")
def test_in_tritons_interpreter(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PUZZLE_ENGINE", "triton")
    with running(models["pairs alone"], **SMALL) as llm:
        before = generate(llm, [[3, 1, 4]], 2)
        with pytest.raises(Exception, match="cannot be reloaded"):
            reload(llm, weights_path=str(models["packed"]))
        reload(llm, weights_path=str(models["other pairs alone"]))
        reload(llm, weights_path=str(models["pairs alone"]))
        llm.reset_prefix_cache()
        assert [each.tokens for each in generate(llm, [[3, 1, 4]], 2)] == [each.tokens for each in before]
