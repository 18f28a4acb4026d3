"""LoRA on attention beside packed experts, and the adapters and targets that would need it on the experts."""

import json
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.lora.request import LoRARequest

from tests.plugin.checkpoints import Checkpoints
from tests.plugin.engine import assert_same_logprobs, generate, running

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8], [1, 1, 2, 3, 5, 8, 13]]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
RANK, ALPHA = 8, 16
MAX_TOKENS = 16
LORA = {"enable_lora": True, "max_lora_rank": RANK, "lora_target_modules": ATTENTION, "dtype": "float32"}


@pytest.fixture
def models(checkpoints: Checkpoints) -> tuple[Path, Path]:
    """(packed, unpacked)."""
    return checkpoints.mixed("qwen3_moe", ("pairs", "uneven", "even"))


def test_beside_plain_experts_it_is_refused(checkpoints: Checkpoints) -> None:
    """vLLM's own experts would fail at the first request."""
    packed, _ = checkpoints.mixed("qwen3_moe")
    with (
        pytest.raises(NotImplementedError, match=r"layers\.2\..* LoRA beside plain experts on a CPU; leave out"),
        running(packed, **LORA),
    ):
        pass


def matrices(model: Path, suffix: str) -> dict[str, torch.Tensor]:
    tensors = {name: tensor for shard in model.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    return {name: tensor for name, tensor in tensors.items() if name.endswith(f"{suffix}.weight")}


def write_adapter(folder: Path, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A random adapter for these matrices, as PEFT saves it; returns what it adds to each."""
    generator = torch.Generator().manual_seed(5)
    saved, added = {}, {}
    for name, weight in weights.items():
        down = 0.3 * torch.randn(RANK, weight.shape[1], generator=generator)
        up = 0.3 * torch.randn(weight.shape[0], RANK, generator=generator)
        module = f"base_model.model.{name.removesuffix('.weight')}"
        saved |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        added[name] = ALPHA / RANK * up @ down
    folder.mkdir()
    save_file(saved, folder / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-2] for name in weights})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return added


def merge(model: Path, added: dict[str, torch.Tensor], merged: Path) -> Path:
    copytree(model, merged)
    for shard in merged.glob("*.safetensors"):
        tensors = load_file(shard)
        tensors |= {name: tensors[name].float() + added[name] for name in tensors.keys() & added.keys()}
        save_file(tensors, shard, {"format": "pt"})
    return merged


def test_an_adapter_for_attention_is_as_good_as_merged(models: tuple[Path, Path], tmp_path: Path) -> None:
    """With it, what the unpacked model with merged weights says; without it, what there was before it; and an adapter
    that names experts is refused at run time, whose attention alone vLLM would have taken."""
    packed, unpacked = models
    attention = {name: w for target in ATTENTION for name, w in matrices(unpacked, f"self_attn.{target}").items()}
    added = write_adapter(tmp_path / "attention", attention)
    write_adapter(tmp_path / "experts", attention | matrices(unpacked, "experts.3.gate_proj"))
    merged = merge(unpacked, added, tmp_path / "merged")
    results = []
    for model in (unpacked, merged):
        with running(model, dtype="float32") as llm:
            results.append(generate(llm, PROMPTS, MAX_TOKENS))
    base, with_adapter = results
    assert [each.tokens for each in base] != [each.tokens for each in with_adapter]
    with running(packed, **LORA) as llm:
        assert_same_logprobs(generate(llm, PROMPTS, MAX_TOKENS), base, tolerance=1e-3)
        adapter = LoRARequest("attention", 1, str(tmp_path / "attention"))
        assert_same_logprobs(generate(llm, PROMPTS, MAX_TOKENS, adapter), with_adapter, tolerance=1e-3)
        with pytest.raises(Exception, match=r"experts has weights for 3 modules of the routed experts.*experts\.3\."):
            llm.llm_engine.add_lora(LoRARequest("experts", 2, str(tmp_path / "experts")))
        assert_same_logprobs(generate(llm, PROMPTS, MAX_TOKENS), base, tolerance=1e-3)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (None, r"LoRA on the routed experts, .*add --lora-target-modules q_proj k_proj v_proj o_proj"),
        (["q_proj", "experts"], r"LoRA on the routed experts \(leave experts out of --lora-target-modules\)"),
        (["model.layers.0.mlp.experts"], r"\(leave model\.layers\.0\.mlp\.experts out of"),
    ],
)
def test_targets_that_take_in_experts(targets: list[str] | None, message: str, models: tuple[Path, Path]) -> None:
    with (
        pytest.raises(NotImplementedError, match=message),
        running(models[0], **{**LORA, "lora_target_modules": targets}),
    ):
        pass
