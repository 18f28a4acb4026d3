"""Coded and plain layers in a packed checkpoint, made by the format's functions alone.

Points and scales have four significant bits, so that every product of the two is a bfloat16 number and an unpacked
checkpoint says exactly what the codes do.
"""

import json
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.tiny import by_expert, expert_views
from vllm_puzzle.format import (
    CODE_BITS,
    INDEX_FILE,
    LayerCodes,
    PuzzleMoEQuantizationConfig,
    coded_tensors,
    decode,
    join_rows,
    layer_index,
    pack_codes,
    parse_expert_name,
    split_rows,
    zero_code,
)

_PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


@dataclass(frozen=True)
class Coded:
    """A matrix of codes: uint8 (rows, columns), bfloat16 (2 ** bits, 2) and (2, rows)."""

    bits: int
    codes: torch.Tensor
    codebook: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def of(cls, weights: torch.Tensor, bits: int) -> "Coded":
        """Rounds (2, rows, columns) to the nearest of some of its own points."""
        scales = _coarse(weights.float().square().mean(dim=2).sqrt())
        # An odd row's mate is all zeros.
        points = (weights.float() / scales[:, :, None]).nan_to_num().permute(1, 2, 0)
        generator = torch.Generator().manual_seed(bits)
        some = torch.randperm(points.numel() // 2, generator=generator)[: 1 << bits]
        codebook = _coarse(points.reshape(-1, 2)[some])
        # Not the first code, so that a zero code is no code of zero.
        codebook[3] = 0
        codes = torch.cdist(points, codebook.expand(len(points), -1, -1)).argmin(dim=2).to(torch.uint8)
        return cls(bits, codes, codebook.bfloat16(), scales.bfloat16())

    @property
    def packed(self) -> torch.Tensor:
        return pack_codes(self.codes, self.bits, zero_code(self.codebook))

    def decoded(self) -> torch.Tensor:
        return decode(self.codes, self.codebook, self.scales).bfloat16()


@dataclass(frozen=True)
class CodedExpert:
    w13: Coded
    w2: Coded
    hidden_size: int

    @classmethod
    def of(cls, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, w13_bits: int, w2_bits: int) -> "CodedExpert":
        return cls(Coded.of(torch.stack([gate, up]), w13_bits), Coded.of(split_rows(down), w2_bits), down.shape[0])

    def tensors(self) -> list[torch.Tensor]:
        """In the order of `coded_tensors`."""
        w13, w2 = self.w13, self.w2
        scales = join_rows(w2.scales[:, :, None], self.hidden_size)[:, 0]
        return [w13.packed, w13.codebook, *w13.scales.clone(), w2.packed, w2.codebook, scales.contiguous()]

    def matrices(self) -> list[torch.Tensor]:
        """Gate, up and down."""
        return [*self.w13.decoded(), join_rows(self.w2.decoded(), self.hidden_size)]


def uneven(layer: int, num_experts: int) -> LayerCodes:
    """Every width, and gate and up's another than down's."""
    w13_bits, w2_bits = (
        list(islice(cycle(widths), num_experts)) for widths in (CODE_BITS, CODE_BITS[2:] + CODE_BITS[:2])
    )
    return LayerCodes(layer=layer, w13_bits=w13_bits, w2_bits=w2_bits)


def store_layers(
    packed: Path, source: Path, layers: dict[int, LayerCodes | None], unpacked: Path | None = None
) -> None:
    """Stores layers of a packed checkpoint in another way: as codes, or plain where there are none.

    Args:
        packed: changed in place.
        source: what it was converted from.
        layers: by the index of a layer that has packed pairs.
        unpacked: its twin, whose matrices become what the codes say.
    """
    original = load_file(source / "model.safetensors")
    experts = by_expert(original)
    index = json.loads((packed / INDEX_FILE).read_text())
    shards = {name: load_file(packed / name) for name in set(index["weight_map"].values())}
    plain_shards = {path: load_file(path) for path in unpacked.glob("*.safetensors")} if unpacked else {}
    views = {name: view for tensors in plain_shards.values() for name, view in expert_views(tensors).items()}
    for layer, codes in layers.items():
        old = [name for name in index["weight_map"] if layer_index(name) == layer and parse_expert_name(name)]
        shard = index["weight_map"][old[0]]
        for name in old:
            del shards[index["weight_map"].pop(name)][name]
        if codes is None:
            new = {
                name: tensor
                for name, tensor in original.items()
                if layer_index(name) == layer and _has_experts(name, tensor)
            }
            decoded = {
                name: tensor for name, tensor in experts.items() if ".experts." in name and layer_index(name) == layer
            }
        else:
            parsed = [parse_expert_name(name) for name in old]
            new, decoded = _code_layer(experts, parsed[0].prefix, {each.projection for each in parsed}, codes)
        shards[shard].update(new)
        index["weight_map"].update(dict.fromkeys(new, shard))
        for name in decoded.keys() & views.keys():
            views[name].copy_(decoded[name])
    for name, tensors in shards.items():
        save_file(tensors, packed / name, {"format": "pt"})
    for path, tensors in plain_shards.items():
        save_file(tensors, path, {"format": "pt"})
    (packed / INDEX_FILE).write_text(json.dumps(index))
    _list_layers(packed, layers)


def _code_layer(
    experts: dict[str, torch.Tensor], prefix: str, projections: set[str], codes: LayerCodes
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors of a coded layer, and the matrices that they decode to."""
    names = next(names for names in _PROJECTIONS if projections & set(names))
    new, decoded = {}, {}
    for expert, bits in enumerate(zip(codes.w13_bits, codes.w2_bits, strict=True)):
        matrices = [f"{prefix}.{expert}.{name}.weight" for name in names]
        coded = CodedExpert.of(*(experts[name] for name in matrices), *bits)
        stored = [tensor.name for tensor in coded_tensors(prefix, expert, names)]
        new.update(zip(stored, coded.tensors(), strict=True))
        decoded.update(zip(matrices, coded.matrices(), strict=True))
    return new, decoded


def _list_layers(packed: Path, layers: dict[int, LayerCodes | None]) -> None:
    config = json.loads((packed / "config.json").read_text())
    section = PuzzleMoEQuantizationConfig.parse(config["quantization_config"])
    pairs = [each for each in section.layers if each.layer not in layers]
    coded = [each for each in section.coded_layers if each.layer not in layers]
    coded += [codes for codes in layers.values() if codes is not None]
    plain = set(section.plain_layers) - layers.keys() | {layer for layer, codes in layers.items() if codes is None}
    changed = {
        **dict(section),
        "format_version": 2,
        "layers": pairs,
        "coded_layers": sorted(coded, key=lambda codes: codes.layer),
        "plain_layers": sorted(plain),
        "max_expert_parallel": section.max_expert_parallel if pairs else section.num_experts,
    }
    config["quantization_config"] = PuzzleMoEQuantizationConfig(**changed).to_json()
    (packed / "config.json").write_text(json.dumps(config))


def _has_experts(name: str, tensor: torch.Tensor) -> bool:
    return any(".experts." in each for each in by_expert({name: tensor}))


def _coarse(values: torch.Tensor) -> torch.Tensor:
    """Rounded to four significant bits."""
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 16).round() / 16, exponent)
