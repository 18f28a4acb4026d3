"""How much the random choice of mates matters: the same rule on several pairings of the same model."""

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.quality.model import QualityModel
from benchmarks.quality.peers import LoggedTokens
from benchmarks.quality.perplexity import perplexity
from vllm_puzzle.format import default_max_expert_parallel
from vllm_puzzle.offline.conversion.pairing import draw_mates
from vllm_puzzle.offline.defaults import DEFAULT_TAU
from vllm_puzzle.offline.merging.layer import ExpertWeights
from vllm_puzzle.offline.merging.pair import ElementRule
from vllm_puzzle.offline.merging.saliency import input_norms, measure_saliency

Rule = Callable[[Sequence[Any]], ElementRule]


def _by_paper(norms: Sequence[Any]) -> ElementRule:
    return ElementRule.of_the_paper(norms, DEFAULT_TAU)


@torch.inference_mode()
def study_seeds(
    model: QualityModel, windows: torch.Tensor, logged: Mapping[int, LoggedTokens], pairings: int
) -> list[dict[str, Any]]:
    """Perplexity at 50 % over some random pairings, for both rules that decide every element by itself.

    `windows` (num_windows, sequence_length) are scored. `logged` are the calibration tokens in the source model, for
    every pairing: what is known of an expert does not depend on its mate.
    """
    generators = [random.Random(seed) for seed in range(pairings)]
    merged: dict[str, list[dict[int, ExpertWeights]]] = {
        "paper's rule": [{} for _ in generators],
        "saliency": [{} for _ in generators],
    }
    for layer, tokens in logged.items():
        experts = model.source(layer)
        ids = range(experts.num_experts)
        norms = [input_norms(experts, expert, tokens) for expert in ids]
        moments = [measure_saliency(experts, expert, tokens, full=False) for expert in ids]
        for seed, generator in enumerate(generators):
            mates = draw_mates(experts.num_experts, default_max_expert_parallel(experts.num_experts), generator)
            merged["paper's rule"][seed][layer] = _merge(experts, mates, _by_paper, norms)
            merged["saliency"][seed][layer] = _merge(experts, mates, ElementRule.of_saliency, moments)
    rows = []
    for method, models in merged.items():
        perplexities = []
        for layers in models:
            for layer, experts in layers.items():
                model.set_layer(layer, experts)
            perplexities.append(perplexity(model.causal, windows.flatten(), windows.shape[1]))
        rows.append(
            {
                "method": f"packed, {method}, 50 %",
                "perplexities": perplexities,
                "mean": statistics.mean(perplexities),
                "standard_deviation": statistics.stdev(perplexities),
            }
        )
    model.reset()
    return rows


def _merge(experts: ExpertWeights, mates: Sequence[tuple[int, int]], rule: Rule, known: Sequence[Any]) -> ExpertWeights:
    result = experts.copy()
    for pair in mates:
        two = rule([known[expert] for expert in pair]).merge(experts, pair)
        for member, expert in enumerate(pair):
            result.gate[expert], result.up[expert], result.down[expert] = (
                matrix.bfloat16() for matrix in two.matrices(member)
            )
    return result
