"""Pairs through the command line: where the budget goes, who becomes mates, and what is said about it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.offline.faulty import edit_tensors
from tests.offline.small import NUM_EXPERTS as NUM_SMALL_EXPERTS
from tests.offline.small import small_experts, small_tokens
from tests.offline.whole_model import run_whole_model
from tests.tiny import NUM_EXPERTS, NUM_LAYERS, build_tiny
from vllm_puzzle.cli import main
from vllm_puzzle.format import LayerSlots, PuzzleMoEQuantizationConfig
from vllm_puzzle.offline.checkpoints.source import SourceCheckpoint
from vllm_puzzle.offline.conversion.calibration_text import read_calibration_text
from vllm_puzzle.offline.conversion.calibration_walk import CalibrationWalk
from vllm_puzzle.offline.conversion.convert import convert
from vllm_puzzle.offline.conversion.options import ConvertOptions
from vllm_puzzle.offline.conversion.pairing import list_candidates
from vllm_puzzle.offline.merging.layer import LayerTokens
from vllm_puzzle.offline.merging.pair_loss import estimate_pairs

pytestmark = pytest.mark.heavy

BLOCK = "model.layers.{layer}.block_sparse_moe"
SALIENCY = ["--rule", "saliency", "--no-align"]


def converted(source: Path, packed: Path, *options: str) -> list[LayerSlots]:
    assert main(["convert", str(source), str(packed), *options]) == 0
    config = json.loads((packed / "config.json").read_text())
    return PuzzleMoEQuantizationConfig.parse(config["quantization_config"]).layers


def pairs_of(slots: LayerSlots) -> set[frozenset[int]]:
    return {frozenset(slots.members(slot)) for slot in range(slots.pairs)}


@pytest.mark.parametrize("pairing", ["random", "loss"])
@pytest.mark.parametrize(("family", "num_layers"), [("mixtral", NUM_LAYERS), ("qwen2_moe", NUM_LAYERS - 1)])
def test_compression_is_a_budget_over_all_layers(family: str, num_layers: int, pairing: str, tmp_path: Path) -> None:
    source = build_tiny(family, tmp_path / "source")
    before = sum(t.nbytes for name, t in load_file(source / "model.safetensors").items() if ".experts." in name)
    for compression in (12.5, 30.0, 50.0):
        packed = tmp_path / str(compression)
        options = ["--compression", str(compression), "--pairing", pairing]
        layers = converted(source, packed, *SALIENCY, *options)
        assert len(layers) == num_layers
        pairs = sum(slots.pairs for slots in layers)
        assert pairs == int(NUM_EXPERTS * num_layers * compression / 100)
        after = sum(
            tensor.nbytes
            for shard in packed.glob("*.safetensors")
            for name, tensor in load_file(shard).items()
            if ".experts." in name
        )
        assert after * NUM_EXPERTS * num_layers == before * (NUM_EXPERTS * num_layers - pairs)


@pytest.mark.parametrize(
    "recipe",
    [
        [*SALIENCY, "--pairing", "random"],
        [*SALIENCY, "--pairing", "loss"],
        ["--rule", "paper", "--pairing", "loss"],
    ],
    ids=" ".join,
)
def test_experts_that_would_lose_most_stay_alone(source: Path, tmp_path: Path, recipe: list[str]) -> None:
    def make_sensitive(tensors: dict[str, torch.Tensor]) -> None:
        for layer, experts in ((1, (1, 6)), (2, range(NUM_EXPERTS))):
            for expert in experts:
                tensors[f"{BLOCK.format(layer=layer)}.experts.{expert}.w2.weight"] *= 30

    edit_tensors(source, make_sensitive)
    # Six pairs; the two sensitive experts of layer 1 belong to different ranks.
    layers = converted(source, tmp_path / "packed", *recipe, "--compression", "25", "--max-expert-parallel", "2")
    assert [slots.pairs for slots in layers] == [4, 2, 0]
    assert not {1, 6} & {expert for pair in pairs_of(layers[1]) for expert in pair}


def test_as_published_every_layer_has_as_many_pairs(source: Path, tmp_path: Path) -> None:
    def make_sensitive(tensors: dict[str, torch.Tensor]) -> None:
        for expert in range(NUM_EXPERTS):
            tensors[f"{BLOCK.format(layer=2)}.experts.{expert}.w2.weight"] *= 30

    edit_tensors(source, make_sensitive)
    layers = converted(source, tmp_path / "packed", "--rule", "paper", "--compression", "25")
    assert [slots.pairs for slots in layers] == [2, 2, 2]


def test_a_seed_draws_the_same_mates_for_every_rule(source: Path, tmp_path: Path, text: Path) -> None:
    """So that rules can be compared; and what random mates lose is told as well."""
    layers = [
        converted(source, tmp_path / rule, "--calibration", str(text), "--rule", rule, "--seed", "3")
        for rule in ("paper", "saliency", "compensated")
    ]
    assert layers[0] == layers[1] == layers[2]
    for rule in ("saliency", "compensated"):
        card = (tmp_path / rule / "README.md").read_text()
        losses = [float(loss) for loss in re.findall(r"^\| \d+ \| 4 \| ([\d.e-]+) \| \S+% \|", card, re.MULTILINE)]
        assert len(losses) == NUM_LAYERS
        assert min(losses) > 0


def test_calibration_finds_mates_that_no_token_would_miss(source: Path, tmp_path: Path, text: Path) -> None:
    """An expert that no token reaches is the cheapest mate of one that many reach, whatever its weights."""
    idle = {2, 3, 4, 7}

    def make_idle(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(NUM_LAYERS):
            # Of two opposite answers of the router one is above zero, so what answers zero is never among the first.
            router = tensors[f"{BLOCK.format(layer=layer)}.gate.weight"]
            router[[1, 6]] = -router[[0, 5]]
            router[list(idle)] = 0

    edit_tensors(source, make_idle)
    options = ["--pairing", "loss", "--max-expert-parallel", "1", *SALIENCY]
    layers = converted(source, tmp_path / "packed", "--calibration", str(text), *options)
    blind = converted(source, tmp_path / "blind", *options)
    for slots, without in zip(layers, blind, strict=True):
        assert all(len(pair & idle) == 1 for pair in pairs_of(slots))
        assert any(len(pair & idle) != 1 for pair in pairs_of(without))


PLANTED = [(0, 5), (1, 4), (2, 7), (3, 6)]


def fire_together(tensors: dict[str, torch.Tensor]) -> None:
    """Mates have the same router weights, so every token that is routed to one is routed to the other."""
    for layer in range(NUM_LAYERS):
        router = tensors[f"{BLOCK.format(layer=layer)}.gate.weight"]
        for first, second in PLANTED:
            router[second] = router[first]


def test_experts_that_fire_together_become_mates(
    source: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_tensors(source, fire_together)
    options = ["--calibration", str(text), "--max-expert-parallel", "1", *SALIENCY]
    layers = converted(source, tmp_path / "packed", *options, "--pairing", "coactivation")
    said = capsys.readouterr().err
    assert all(pairs_of(slots) == {frozenset(pair) for pair in PLANTED} for slots in layers)
    # Both numbers are said in any case, so that pairings can be compared before anything is served.
    converted(source, tmp_path / "loss", *options, "--pairing", "loss")
    by_loss = capsys.readouterr().err
    numbers = []
    for pairing, sentence in (("coactivation", said), ("loss", by_loss)):
        found = re.search(
            rf"^pairing {pairing}: 12 pairs, 4 a layer; estimated loss ([\d.e-]+) of the residual stream's "
            r"energy a layer, mates fire together on ([\d.]+)% of the tokens that reach either$",
            sentence,
            re.MULTILINE,
        )
        assert found
        numbers.append((float(found[1]), float(found[2])))
    (coactivation_loss, together), (least_loss, less_together) = numbers
    assert 0 < least_loss < coactivation_loss
    # A router in bfloat16 has other ties too.
    assert together > 95 > less_together


def test_mates_that_fire_together_still_stay_on_one_rank(source: Path, tmp_path: Path, text: Path) -> None:
    edit_tensors(source, fire_together)
    options = ["--calibration", str(text), *SALIENCY, "--pairing", "coactivation"]
    for slots in converted(source, tmp_path / "packed", *options, "--max-expert-parallel", "2"):
        assert slots.pairs == 4
        assert all(len({expert // 4 for expert in pair}) == 1 for pair in pairs_of(slots))


def test_pairs_of_least_loss_lose_less_than_any_at_random(
    source: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def estimated_loss(*options: str) -> float:
        name = "-".join(options)
        converted(source, tmp_path / name, "--calibration", str(text), *SALIENCY, *options)
        found = re.search(r"estimated loss ([\d.e-]+) of", capsys.readouterr().err)
        assert found
        return float(found[1])

    best = estimated_loss("--pairing", "loss")
    for seed in range(2):
        assert best < estimated_loss("--seed", str(seed))


def test_the_card_has_what_was_estimated_of_each_layer(source: Path, tmp_path: Path, text: Path) -> None:
    options = ["--compression", "25", "--pairing", "loss", "--calibration", str(text)]
    layers = converted(source, tmp_path / "packed", *SALIENCY, *options)
    card = (tmp_path / "packed" / "README.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\S+) \| (\S+)% \|", card, re.MULTILINE)
    assert [(int(layer), int(pairs)) for layer, pairs, *_ in rows] == [(slots.layer, slots.pairs) for slots in layers]
    assert all(float(loss) > 0 and 0 <= float(together) <= 100 for _, _, loss, together in rows)
    assert "| pairing | loss, within 2 rank(s) of 4 experts, seed 0 |" in card
    assert "| rule | `saliency` |" in card


def test_what_is_expected_of_mates_is_what_their_tokens_say() -> None:
    experts, routed = small_experts(), small_tokens(80, idle=[3])
    pairs = list_candidates(NUM_SMALL_EXPERTS, 1)
    considered = {each.experts: each for each in estimate_pairs(experts, pairs, LayerTokens(routed, 1.0))}
    assert set(considered) == set(pairs)
    chosen = [set(ids) for ids in routed.topk_ids.tolist()]
    for first, second in pairs:
        either = sum(bool({first, second} & ids) for ids in chosen)
        both = sum({first, second} <= ids for ids in chosen)
        assert considered[first, second].coactivation == pytest.approx(both / either)
    merged = {pair: each.loss for pair, each in considered.items()}
    # Four times the energy that norms divide by, a quarter of the loss; and twice the weights, four times.
    assert estimate_pairs(experts, pairs, LayerTokens(routed, 4.0))[0].loss == pytest.approx(merged[pairs[0]] / 4)
    experts.down = [matrix * 2 for matrix in experts.down]
    assert estimate_pairs(experts, pairs, LayerTokens(routed, 1.0))[0].loss == pytest.approx(merged[pairs[0]] * 4)


def test_without_tokens_nothing_is_known_of_who_fires_together() -> None:
    considered = estimate_pairs(small_experts(), [(0, 1), (2, 3)], None)
    assert [each.coactivation for each in considered] == [0.0, 0.0]
    assert all(each.loss > 0 for each in considered)


def test_pairs_are_chosen_by_the_tokens_that_merging_sees(
    source: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both run them through the source model, whatever was merged before."""
    seen: list[LayerTokens] = []
    enter = CalibrationWalk.enter

    def record(*arguments: Any) -> LayerTokens | None:
        tokens = enter(*arguments)
        assert tokens is not None
        seen.append(tokens)
        return tokens

    monkeypatch.setattr(CalibrationWalk, "enter", record)
    converted(source, tmp_path / "packed", "--calibration", str(text), *SALIENCY, "--pairing", "loss")
    checkpoint = SourceCheckpoint(source)
    read = read_calibration_text(text, checkpoint, checkpoint.config, 128)
    whole = run_whole_model(source, read.token_ids, checkpoint.shape)
    chosen, merged = seen[:NUM_LAYERS], seen[NUM_LAYERS:]
    for tokens, again, leaving in zip(chosen, merged, whole.leaving, strict=True):
        assert torch.equal(tokens.routed.hidden, again.routed.hidden)
        assert torch.equal(tokens.routed.topk_ids, again.routed.topk_ids)
        # What the next norm divides by, after the layer.
        assert tokens.energy == again.energy
        assert tokens.energy == pytest.approx(
            len(leaving) / float((1 / leaving.float().square().sum(dim=1)).mean()), rel=0.1
        )


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("rule", ["paper", "saliency"])
def test_progress_ends_at_the_total(rule: str, calibrated: bool, tmp_path: Path, text: Path) -> None:
    """Of a model with a layer that has no experts."""
    steps = []
    options = ConvertOptions(calibration=text if calibrated else None, rule=rule)
    source = build_tiny("qwen2_moe", tmp_path / "source")
    convert(source, tmp_path / "packed", options, lambda sentence: None, lambda *step: steps.append(step))
    assert len({total for _, total in steps}) == 1
    assert sum(num_bytes for num_bytes, _ in steps) == steps[0][1]
