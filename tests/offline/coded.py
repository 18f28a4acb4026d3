"""Checkpoints of coded experts as tests make and read them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.offline.checkpoints import read_all
from vllm_puzzle.cli import main
from vllm_puzzle.format import (
    PuzzleMoEQuantizationConfig,
    decode,
    join_rows,
    layer_index,
    parse_expert_name,
    split_rows,
    unpack_codes,
)


def convert(source: Path, packed: Path, *options: str) -> Path:
    assert main(["convert", str(source), str(packed), *options]) == 0
    return packed


def quantization_of(packed: Path) -> PuzzleMoEQuantizationConfig:
    config = json.loads((packed / "config.json").read_text())
    return PuzzleMoEQuantizationConfig.parse(config["quantization_config"])


def decode_all(packed: Path) -> dict[str, torch.Tensor]:
    """Every matrix of the coded experts in bfloat16, by its source's name, from the stored tensors alone."""
    tensors, quantization = read_all(packed), quantization_of(packed)
    hidden, inner = quantization.hidden_size, quantization.intermediate_size
    up_of = {"gate_proj": "up_proj", "w1": "w3"}
    decoded = {}
    for name, words in tensors.items():
        parsed = parse_expert_name(name)
        if parsed is None or parsed.suffix != "weight_packed":
            continue
        codes = quantization.coded_layer(layer_index(name) or 0)
        assert codes is not None
        beside = name.removesuffix("_packed")
        codebook, up = tensors[f"{beside}_codebook"], up_of.get(parsed.projection)
        if up is not None:
            other = beside.replace(f".{parsed.projection}.", f".{up}.")
            scales = torch.stack([tensors[f"{beside}_scale"], tensors[f"{other}_scale"]])
            stored = unpack_codes(words, codes.w13_bits[parsed.expert], hidden)
            decoded[beside], decoded[other] = decode(stored, codebook, scales).bfloat16()
            continue
        scales = split_rows(tensors[f"{beside}_scale"][:, None])[..., 0]
        stored = unpack_codes(words, codes.w2_bits[parsed.expert], inner)
        decoded[beside] = join_rows(decode(stored, codebook, scales), hidden).bfloat16()
    return decoded


def make_mixed(source: Path, paired: Path, coded: Path, mixed: Path) -> Path:
    """Layer 0 of `paired`, layer 1 of `coded` and layer 2 of their source, which has three, as one checkpoint."""
    mixed.mkdir()
    for file in coded.iterdir():
        if file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            (mixed / file.name).write_bytes(file.read_bytes())
    stored = [{}, {}, {}]
    for kind, path in zip(stored, (paired, coded, source), strict=True):
        for shard in path.glob("*.safetensors"):
            kind.update(load_file(shard))
    tensors = {name: value for name, value in stored[2].items() if layer_index(name) in (None, 2)}
    for layer in (0, 1):
        tensors |= {name: value for name, value in stored[layer].items() if layer_index(name) == layer}
    save_file(tensors, mixed / "model.safetensors", {"format": "pt"})
    config = json.loads((coded / "config.json").read_text())
    section = config["quantization_config"]
    section["layers"] = json.loads((paired / "config.json").read_text())["quantization_config"]["layers"][:1]
    section["coded_layers"], section["plain_layers"] = section["coded_layers"][1:2], [2]
    section["max_expert_parallel"] = 2
    (mixed / "config.json").write_text(json.dumps(config))
    manifest = {"manifest_version": 2, "tool_version": "x", "shards": [], "layers": [], "coded_layers": []}
    (mixed / "puzzlemoe_manifest.json").write_text(json.dumps(manifest))
    return mixed
