"""Everything about one variant of the reference model."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.methods import PACKED, Cost, apply_packed, compress_by_peers
from benchmarks.quality.model import QualityModel
from benchmarks.quality.peers import PEERS, Peer
from benchmarks.quality.score import Scorer, continue_greedily, tokens_until_divergence
from benchmarks.quality.seeds import study_seeds
from benchmarks.reference_model.build import Variant
from benchmarks.reference_model.wheels import read_text
from vllm_puzzle.offline.conversion.calibration_text import read_calibration_text

TEXT_TOKENS = 8192
SEQUENCE_LENGTH = 256
CALIBRATION_SEQUENCES = 8
SEED = 0
PROMPTS, PROMPT_LENGTH, CONTINUATION_LENGTH = 16, 64, 64


@dataclass
class Tables:
    """What was measured: rows of `methods`, of the generation check, and of the study of seeds."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    generation: list[dict[str, Any]] = field(default_factory=list)
    seeds: list[dict[str, Any]] = field(default_factory=list)

    def add(self, kind: list[dict[str, Any]], row: dict[str, Any]) -> None:
        kind.append(row)
        print(json.dumps(row), flush=True)


def measure(name: Variant, folder: Path, calibration: Path, cache: Path, num_threads: int) -> Tables:
    """Everything about one variant."""
    torch.set_num_threads(num_threads)
    tables = Tables()
    model = QualityModel(folder)
    ids = model.tokenizer(read_text("wiki", cache), return_tensors="pt", verbose=False).input_ids[0]
    windows = ids[:TEXT_TOKENS].reshape(-1, SEQUENCE_LENGTH)
    scorer = Scorer(model, windows)
    prompts = ids[TEXT_TOKENS : TEXT_TOKENS + PROMPTS * PROMPT_LENGTH].reshape(PROMPTS, PROMPT_LENGTH)
    wanted = continue_greedily(model, prompts, CONTINUATION_LENGTH)
    text = read_calibration_text(calibration, model.checkpoint, model.config, CALIBRATION_SEQUENCES)

    def add(method: str, cost: Cost) -> None:
        score = scorer.score()
        tables.add(
            tables.rows,
            {
                "model": name,
                "method": method,
                "bits_per_expert_weight": cost.bits,
                "perplexity": score.perplexity,
                "kl_divergence": score.kl_divergence,
                "top1_agreement": score.top1_agreement,
                "seconds": cost.seconds,
            },
        )
        agreed = tokens_until_divergence(model, prompts, wanted)
        mean = sum(agreed) / len(agreed)
        tables.add(
            tables.generation,
            {"model": name, "method": method, "bits_per_expert_weight": cost.bits, "tokens": agreed, "mean": mean},
        )
        model.reset()

    add("uncompressed", Cost(16.0, 0.0))
    for row in PACKED:
        add(row.method, apply_packed(model, row, calibration, CALIBRATION_SEQUENCES, SEED))
    for peers in _together(PEERS.values()):
        for peer, compressed in zip(peers, compress_by_peers(model, peers, text.token_ids, SEED), strict=True):
            compressed.apply(model)
            add(peer.name, compressed.cost)
    for study in study_seeds(model, windows, text.token_ids):
        tables.add(tables.seeds, {"model": name, **study})
    return tables


def _together(peers: Iterable[Peer]) -> list[list[Peer]]:
    """Peers that can share one run of the calibration text: all that see the uncompressed model."""
    groups: dict[object, list[Peer]] = {}
    for peer in peers:
        key = peer.name if peer.sequential else peer.needs_calibration
        groups.setdefault(key, []).append(peer)
    return list(groups.values())
