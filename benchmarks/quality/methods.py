"""Compressing the reference model in every way that the table compares."""

import random
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.quality.model import QualityModel, in_bfloat16
from benchmarks.quality.peers import CompressedLayer, LoggedTokens, Peer
from vllm_puzzle.offline.conversion.convert import convert
from vllm_puzzle.offline.conversion.options import ConvertOptions
from vllm_puzzle.offline.merging.layer import ExpertWeights


class Packed(NamedTuple):
    """A row that the converter makes, with these of its options."""

    method: str
    options: Mapping[str, Any]


PACKED = (
    Packed("packed, paper's rule", {"rule": "paper", "align": False}),
    Packed("packed, saliency", {"rule": "saliency", "align": False}),
    Packed("packed, saliency, aligned", {"rule": "saliency", "align": True}),
    Packed("packed, compensated", {"rule": "compensated", "align": False}),
    *(
        Packed("packed, compensated, aligned", {"rule": "compensated", "align": True, "compression": compression})
        for compression in (50.0, 37.5, 25.0, 12.5)
    ),
    *(Packed(f"codes, {bits:g} bits, even", {"bits": bits, "even": True}) for bits in (2.0, 2.5, 3.0, 4.0)),
    *(Packed(f"codes, {bits:g} bits", {"bits": bits}) for bits in (2.25, 2.5, 3.0)),
)


class Cost(NamedTuple):
    """Bits of memory an expert weight takes, and how long compressing took."""

    bits: float
    seconds: float


def apply_packed(model: QualityModel, row: Packed, calibration: Path, sequences: int, seed: int) -> Cost:
    """Converts the model's checkpoint as `vllm-puzzle convert` does and takes the experts from what it wrote."""
    options = ConvertOptions(calibration, sequences, seed=seed, **row.options)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        result = convert(model.checkpoint.path, Path(folder, "packed"), options, print, lambda _, __: None)
        seconds = time.perf_counter() - start
        model.load_packed(Path(folder, "packed"))
    return Cost(16 * result.expert_bytes_after / result.expert_bytes_before, seconds)


@dataclass
class Compressed:
    """What a peer makes of each layer, in bfloat16; `cost` does not count the calibration that peers share."""

    layers: dict[int, CompressedLayer]
    cost: Cost

    def apply(self, model: QualityModel) -> None:
        """Puts it into the model."""
        for layer, compressed in self.layers.items():
            model.set_layer(layer, compressed.experts, compressed.dropped)


def calibrate(model: QualityModel, token_ids: torch.Tensor) -> dict[int, LoggedTokens]:
    """The tokens that enter each layer's experts in the model as it is, of int64 (num_sequences, sequence_length)."""
    logged: dict[int, LoggedTokens] = {}

    def log(layer: int, tokens: LoggedTokens) -> ExpertWeights:
        logged[layer] = tokens
        return model.source(layer)

    energies = model.visit(token_ids, log)
    return {layer: replace(tokens, energy=energies[layer]) for layer, tokens in logged.items()}


@torch.inference_mode()
def compress_by_peer(
    model: QualityModel, peer: Peer, token_ids: torch.Tensor, logged: Mapping[int, LoggedTokens], seed: int
) -> Compressed:
    """Compresses every layer.

    `token_ids` are those that the converter calibrates on, and `logged` is what `calibrate` makes of them; a sequential
    peer runs them again, through what it leaves.
    """
    generator = random.Random(seed)
    layers: dict[int, CompressedLayer] = {}

    def compress(layer: int, tokens: LoggedTokens) -> ExpertWeights:
        result = peer.method(model.source(layer), tokens, generator)
        layers[layer] = CompressedLayer(in_bfloat16(result.experts), result.dropped, result.bits)
        return layers[layer].experts

    start = time.perf_counter()
    if peer.sequential:
        model.visit(token_ids, compress)
    else:
        for layer, tokens in logged.items():
            compress(layer, tokens)
    seconds = time.perf_counter() - start
    return Compressed(layers, Cost(mean_bits(layers) if peer.bits is None else peer.bits, seconds))


def mean_bits(layers: Mapping[int, CompressedLayer]) -> float:
    """Of layers of one size that say what they take."""
    return sum(layer.bits or 0.0 for layer in layers.values()) / len(layers)
