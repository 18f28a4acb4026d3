"""Everything about one variant of the reference model."""

import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.codes import EVEN_CODES, spend_alone
from benchmarks.quality.methods import PACKED, Compressed, Cost, apply_packed, calibrate, compress_by_peer, mean_bits
from benchmarks.quality.model import QualityModel
from benchmarks.quality.peers import PEERS, LoggedTokens
from benchmarks.quality.score import Scorer, continue_greedily, tokens_until_divergence
from benchmarks.quality.seeds import study_seeds
from benchmarks.reference_model.build import Variant
from benchmarks.reference_model.wheels import TextName, read_text
from vllm_puzzle.offline.conversion.calibration_text import read_calibration_text

SEQUENCE_LENGTH = 256
PROMPT_LENGTH, CONTINUATION_LENGTH = 64, 64


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    `text_tokens` of `text` are scored, `sequences` of 2048 tokens calibrate, `prompts` are continued greedily and
    `pairings` are drawn for the study of seeds; 0 leaves out either. Only rows whose method `rows` finds something in
    are made. `seed` draws pairs, and says where in the calibration text its sequences begin.
    """

    text: TextName = "wiki"
    text_tokens: int = 8192
    sequences: int = 8
    prompts: int = 16
    pairings: int = 8
    rows: str = ""
    seed: int = 0


@dataclass
class Tables:
    """What was measured: rows of `methods`, of the generation check, and of the study of seeds."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    generation: list[dict[str, Any]] = field(default_factory=list)
    seeds: list[dict[str, Any]] = field(default_factory=list)

    def add(self, kind: list[dict[str, Any]], row: dict[str, Any]) -> None:
        kind.append(row)
        print(json.dumps(row), flush=True)


class _Measurement:
    """One variant, its texts, and what the uncompressed model made of them."""

    def __init__(self, name: Variant, folder: Path, calibration: Path, cache: Path, settings: Settings) -> None:
        self._name = name
        self._settings = settings
        self.tables = Tables()
        self.model = QualityModel(folder)
        ids = self.model.tokenizer(read_text(settings.text, cache), return_tensors="pt", verbose=False).input_ids[0]
        count = settings.text_tokens
        self.windows = ids[:count].reshape(-1, SEQUENCE_LENGTH)
        self._scorer = Scorer(self.model, self.windows)
        prompts = ids[count : count + settings.prompts * PROMPT_LENGTH]
        self._prompts = prompts.reshape(settings.prompts, PROMPT_LENGTH)
        if settings.prompts:
            self._wanted = continue_greedily(self.model, self._prompts, CONTINUATION_LENGTH)
        text = read_calibration_text(calibration, self.model.checkpoint, self.model.config, settings.sequences)
        self.token_ids = text.token_ids
        self.logged: dict[int, LoggedTokens] = calibrate(self.model, text.token_ids)

    def wants(self, method: str) -> bool:
        return re.search(self._settings.rows, method) is not None

    def add(self, method: str, cost: Cost, in_order: bool = True) -> None:
        """Adds the rows of what the model holds at this moment, and resets it.

        Where experts are dropped, or their neurons not `in_order`, an output error by weights says nothing.
        """
        score = self._scorer.score()
        comparable = in_order and not self.model.drops_experts
        error = self.model.output_error(self.logged) if comparable else None
        content = {
            "output_error": error,
            "perplexity": score.perplexity,
            "kl_divergence": score.kl_divergence,
            "kl_with_source_routing": score.kl_with_source_routing,
            "top1_agreement": score.top1_agreement,
            "seconds": cost.seconds,
        }
        row = {"model": self._name, "method": method, "bits_per_expert_weight": cost.bits}
        self.tables.add(self.tables.rows, row | content)
        if self._settings.prompts:
            agreed = tokens_until_divergence(self.model, self._prompts, self._wanted)
            mean = sum(agreed) / len(agreed)
            self.tables.add(self.tables.generation, row | {"tokens": agreed, "mean": mean})
        self.model.reset()

    def add_seeds(self) -> None:
        """Adds the study of seeds."""
        for study in study_seeds(self.model, self.windows, self.logged, self._settings.pairings):
            self.tables.add(self.tables.seeds, {"model": self._name, **study})


def measure(
    name: Variant, folder: Path, calibration: Path, cache: Path, settings: Settings, num_threads: int
) -> Tables:
    """Everything about one variant."""
    torch.set_num_threads(num_threads)
    measurement = _Measurement(name, folder, calibration, cache, settings)
    model = measurement.model
    measurement.add("uncompressed", Cost(16.0, 0.0))
    for row in PACKED:
        if measurement.wants(row.method):
            cost = apply_packed(model, row, calibration, settings.sequences, settings.seed)
            measurement.add(row.method, cost, in_order=not row.options.get("align", False))
    for peer in (*EVEN_CODES.values(), *PEERS.values()):
        if measurement.wants(peer.name):
            compressed = compress_by_peer(model, peer, measurement.token_ids, measurement.logged, settings.seed)
            compressed.apply(model)
            measurement.add(peer.name, compressed.cost)
    for bits, by in ((2.5, "layer"), (2.5, "expert"), (3.0, "expert")):
        method = f"codes, {bits:g} bits by {by}"
        if measurement.wants(method):
            start = time.perf_counter()
            layers = spend_alone(model, measurement.logged, bits, by == "expert")
            cost = Cost(mean_bits(layers), time.perf_counter() - start)
            Compressed(layers, cost).apply(model)
            measurement.add(method, cost)
    if settings.pairings:
        measurement.add_seeds()
    return measurement.tables
