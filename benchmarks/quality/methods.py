"""Compressing the reference model in every way that the table compares."""

import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.quality.model import QualityModel, in_bfloat16
from benchmarks.quality.peers import CompressedLayer, LoggedTokens, Peer
from vllm_puzzle.offline.checkpoints.dense import build_model
from vllm_puzzle.offline.conversion.calibration import Calibrator, HiddenStates
from vllm_puzzle.offline.conversion.convert import convert
from vllm_puzzle.offline.conversion.options import ConvertOptions
from vllm_puzzle.offline.merging.layer import ExpertWeights


class Packed(NamedTuple):
    """A row that the converter makes."""

    method: str
    rule: str
    align: bool
    compression: float


PACKED = (
    Packed("packed, paper's rule", "paper", False, 50.0),
    Packed("packed, saliency", "saliency", False, 50.0),
    Packed("packed, saliency, aligned", "saliency", True, 50.0),
    Packed("packed, compensated", "compensated", False, 50.0),
    Packed("packed, compensated, aligned", "compensated", True, 50.0),
    Packed("packed, compensated, aligned", "compensated", True, 37.5),
    Packed("packed, compensated, aligned", "compensated", True, 25.0),
    Packed("packed, compensated, aligned", "compensated", True, 12.5),
)


class Cost(NamedTuple):
    """Bits of memory an expert weight takes, and how long compressing took."""

    bits: float
    seconds: float


def apply_packed(model: QualityModel, row: Packed, calibration: Path, sequences: int, seed: int) -> Cost:
    """Converts the model's checkpoint as `vllm-puzzle convert` does and takes the experts from what it wrote."""
    options = ConvertOptions(
        calibration, sequences, rule=row.rule, align=row.align, compression=row.compression, seed=seed
    )
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        result = convert(model.checkpoint.path, Path(folder, "packed"), options, print, lambda _, __: None)
        seconds = time.perf_counter() - start
        model.load_packed(Path(folder, "packed"))
    return Cost(16 * result.expert_bytes_after / result.expert_bytes_before, seconds)


@dataclass
class Compressed:
    """What a peer makes of each layer, in bfloat16; `cost` counts the calibration that it shared with others too."""

    layers: dict[int, CompressedLayer]
    cost: Cost

    def apply(self, model: QualityModel) -> None:
        """Puts it into the model."""
        for layer, compressed in self.layers.items():
            model.set_layer(layer, compressed.experts, compressed.dropped)


@torch.inference_mode()
def compress_by_peers(
    model: QualityModel, peers: Sequence[Peer], token_ids: torch.Tensor, seed: int
) -> list[Compressed]:
    """Compresses every layer by each of `peers`, which see the same tokens: a sequential one therefore comes alone.

    `token_ids` are those that the converter calibrates on. Where no peer needs them none is run.
    """
    generators = [random.Random(seed) for _ in peers]
    layers: list[dict[int, CompressedLayer]] = [{} for _ in peers]
    seconds = [0.0 for _ in peers]
    start = time.perf_counter()
    calibrated = any(peer.needs_calibration for peer in peers)
    for layer, experts, tokens, hidden in walk(model, token_ids) if calibrated else _walk_without_tokens(model):
        for index, peer in enumerate(peers):
            before = time.perf_counter()
            result = peer.method(experts, tokens, generators[index])
            layers[index][layer] = CompressedLayer(in_bfloat16(result.experts), result.dropped)
            seconds[index] += time.perf_counter() - before
        if hidden is not None:
            sees = layers[0][layer].experts if peers[0].sequential else experts
            hidden.add(tokens.through(sees))
    shared = time.perf_counter() - start - sum(seconds)
    return [
        Compressed(made, Cost(peer.bits, shared + own)) for peer, made, own in zip(peers, layers, seconds, strict=True)
    ]


def _walk_without_tokens(model: QualityModel) -> Iterator[tuple[int, ExpertWeights, LoggedTokens, None]]:
    nothing = torch.zeros(0, model.shape.hidden_size, dtype=torch.bfloat16)
    tokens = LoggedTokens(nothing, torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1), torch.zeros(0, 1))
    for layer in model.shape.moe_layers:
        yield layer, model.source(layer), tokens, None


def walk(
    model: QualityModel, token_ids: torch.Tensor
) -> Iterator[tuple[int, ExpertWeights, LoggedTokens, HiddenStates]]:
    """Every MoE layer with the calibration tokens that enter its experts, through the converter's own calibration.

    Yields the layer, its uncompressed experts, the tokens, and the hidden states that lack the experts' output: add
    it before going on.
    """
    checkpoint, shape = model.checkpoint, model.shape
    calibrator = Calibrator(
        checkpoint, build_model(model.config, checkpoint.path / "config.json"), token_ids, torch.device("cpu")
    )
    hidden = calibrator.embed()
    for layer in range(shape.num_hidden_layers):
        routed = calibrator.run(layer, hidden)
        if routed is None:
            continue
        name = f"{shape.block_prefix(layer)}gate.weight"
        router = checkpoint.read([name])[name]
        logits = (routed.hidden @ router.to(routed.hidden.dtype).T).float()
        tokens = LoggedTokens(routed.hidden, routed.topk_ids, routed.topk_weights, logits)
        yield layer, model.source(layer), tokens, hidden
