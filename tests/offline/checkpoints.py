"""Checkpoints as tests read and make them."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.offline.faulty import edit_config
from tests.tiny import by_expert
from vllm_puzzle.format import LayerSlots, PuzzleMoEQuantizationConfig

# Neither divides 96 or 40.
BLOCK = (36, 28)


def read_stored(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, as its files have it."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in path.glob("*.safetensors"):
        tensors.update(load_file(shard))
    return tensors


def read_all(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, those of all experts split into each expert's."""
    return by_expert(read_stored(path))


def expert_bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for name, tensor in tensors.items() if ".experts." in name)


def quantize(source: Path, plain: Path) -> None:
    """Makes `source` an FP8 checkpoint as DeepSeek-V3 is one, and `plain` what it stands for in BF16."""
    tensors = load_file(source / "model.safetensors")
    stored, meant = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight"):
            continue
        rows, columns = tensor.shape
        scale = torch.empty(math.ceil(rows / BLOCK[0]), math.ceil(columns / BLOCK[1]))
        weight, restored = torch.empty(rows, columns, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                part = (slice(i * BLOCK[0], (i + 1) * BLOCK[0]), slice(j * BLOCK[1], (j + 1) * BLOCK[1]))
                scale[i, j] = tensor[part].abs().max().float() / 448 * (1 + i + 2 * j)
                weight[part] = (tensor[part].float() / scale[i, j]).to(torch.float8_e4m3fn)
                restored[part] = weight[part].float() * scale[i, j]
        stored[name], stored[f"{name}_scale_inv"] = weight, scale
        meant[name] = restored.bfloat16()
    plain.mkdir()
    for file in source.iterdir():
        (plain / file.name).write_bytes(file.read_bytes())
    save_file(meant, plain / "model.safetensors", {"format": "pt"})
    save_file(stored, source / "model.safetensors", {"format": "pt"})
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": BLOCK}
    edit_config(source, quantization_config=quantization)


def slots_of(packed: Path) -> list[LayerSlots]:
    """The slots of each MoE layer, from config.json."""
    config = json.loads((packed / "config.json").read_text())
    return PuzzleMoEQuantizationConfig.parse(config["quantization_config"]).layers
