"""What is asked for, what is taken where it is left open, and what is said before the work starts."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.tiny import build_tiny
from vllm_puzzle.offline.checkpoints.families import FAMILIES
from vllm_puzzle.offline.checkpoints.shape import MoEShape
from vllm_puzzle.offline.conversion.convert import convert
from vllm_puzzle.offline.conversion.estimate import Estimate, Speed, choose_method
from vllm_puzzle.offline.conversion.methods import open_methods
from vllm_puzzle.offline.conversion.options import ConvertOptions
from vllm_puzzle.offline.conversion.pair_estimate import estimate_merging
from vllm_puzzle.offline.conversion.pairing import PairBudget
from vllm_puzzle.offline.conversion.work import Work
from vllm_puzzle.offline.errors import CheckpointError
from vllm_puzzle.offline.merging import rules
from vllm_puzzle.offline.merging.recipe import Recipe

TEXT = Path("text")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ConvertOptions(calibration=TEXT),
            [("compensated", True), ("compensated", False), ("saliency", True), ("saliency", False)],
        ),
        (ConvertOptions(), [("saliency", True), ("saliency", False)]),
        (ConvertOptions(calibration=TEXT, align=False), [("compensated", False), ("saliency", False)]),
        (ConvertOptions(calibration=TEXT, align=True), [("compensated", True), ("saliency", True)]),
        (ConvertOptions(calibration=TEXT, rule="compensated"), [("compensated", True), ("compensated", False)]),
        (ConvertOptions(calibration=TEXT, rule="compensated", align=False), [("compensated", False)]),
        (ConvertOptions(rule="saliency"), [("saliency", True), ("saliency", False)]),
        (ConvertOptions(calibration=TEXT, rule="paper"), [("paper", False)]),
        (ConvertOptions(rule="paper", align=False), [("paper", False)]),
    ],
)
def test_what_is_left_open_is_tried_from_the_best_on(options: ConvertOptions, expected: list[tuple[str, bool]]) -> None:
    options = replace(options, pairing="loss")
    assert [(recipe.rule.name, recipe.align) for recipe in options.recipes()] == expected
    assert {(recipe.pairing, recipe.tau) for recipe in options.recipes()} == {("loss", 0.4)}


@pytest.mark.parametrize(("tau", "used"), [(None, 0.4), (0.3, 0.3), (0.0, 0.0)])
def test_tau_is_the_papers_unless_it_is_given(tau: float | None, used: float) -> None:
    assert {recipe.tau for recipe in ConvertOptions(rule="paper", tau=tau).recipes()} == {used}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "compensated"}, "--rule compensated needs to see tokens; give --calibration FILE"),
        ({"pairing": "coactivation"}, "--pairing coactivation needs to see tokens; give --calibration FILE"),
        (
            {"rule": "paper", "align": True},
            "--rule paper merges neurons in their own order; leave out --align",
        ),
        ({"rule": "saliency", "tau": 0.3}, "--tau 0.3 is only used with --rule paper; give that"),
        ({"tau": 0.4}, "--tau 0.4 is only used with --rule paper"),
        ({"rule": "magic"}, "--rule magic is not known"),
        ({"pairing": "magic"}, "--pairing magic is not known"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ConvertOptions(**options)


@pytest.mark.parametrize(
    ("recipe", "all_paired", "chooses"),
    [
        (Recipe(rules.SALIENCY), True, False),
        (Recipe(rules.SALIENCY), False, True),
        (Recipe(rules.SALIENCY, pairing="loss"), True, True),
        (Recipe(rules.PAPER), False, False),
        (Recipe(rules.PAPER, pairing="coactivation"), True, True),
    ],
)
def test_only_a_choice_takes_estimates(recipe: Recipe, all_paired: bool, chooses: bool) -> None:
    assert recipe.chooses(all_paired) == chooses


# Two billion weights: an hour a billion is 7200 seconds.
LONG, SHORT = Estimate(7300.0, 1, 2 * 10**9), Estimate(7100.0, 1, 2 * 10**9)
TINY = Estimate(800.0, 1, 10**6)
SHAPE = MoEShape(FAMILIES["MixtralForCausalLM"], 64, 2048, 1024, 16, tuple(range(16)))
METHODS = open_methods(ConvertOptions(calibration=TEXT), SHAPE)


@pytest.mark.parametrize(
    ("estimates", "chosen"),
    [
        ([SHORT, SHORT, SHORT, SHORT], 0),
        ([LONG, SHORT, SHORT, SHORT], 1),
        ([LONG, LONG, SHORT, LONG], 2),
        ([LONG, LONG, LONG, LONG], 3),
        # Many minutes a weight, but few in all.
        ([TINY, SHORT, SHORT, SHORT], 0),
    ],
)
def test_the_best_recipe_in_reasonable_time_is_taken(estimates: list[Estimate], chosen: int) -> None:
    assert choose_method(list(zip(METHODS, estimates, strict=True))) == (METHODS[chosen], estimates[chosen])


def test_better_recipes_are_estimated_to_cost_more() -> None:
    work = Work(SHAPE, num_tokens=1 << 18, top_k=8, layer_bytes=10**9, dense_weights=10**9)
    speed = Speed(products=1e11, elements=1e9)
    recipes = [*ConvertOptions(calibration=TEXT).recipes(), Recipe(rules.PAPER)]
    all_paired = PairBudget(max_expert_parallel=8, per_layer=32, total=512, all_paired=True)
    estimates = [estimate_merging(recipe, all_paired, work, speed) for recipe in recipes]
    assert estimates[0].seconds > estimates[1].seconds > estimates[3].seconds > estimates[4].seconds
    assert estimates[0].seconds > estimates[2].seconds > estimates[3].seconds
    assert {each.expert_weights for each in estimates} == {64 * 16 * 3 * 2048 * 1024}
    assert all(each.num_bytes >= 2 * work.layer_bytes for each in estimates)
    # Half as much of everything that is measured takes half as long on a device that is twice as fast.
    twice = estimate_merging(recipes[3], all_paired, work, Speed(products=2e11, elements=2e9))
    assert twice.seconds == pytest.approx(estimates[3].seconds / 2)
    fewer = estimate_merging(
        recipes[0], replace(all_paired, total=256), replace(work, num_tokens=work.num_tokens // 2), speed
    )
    assert fewer.seconds < estimates[0].seconds
    assert fewer.num_bytes < estimates[0].num_bytes
    assert (
        str(Estimate(7200.0, 3 * 10**9, 2 * 10**9))
        == "about 2.0 hours (60.0 minutes a billion weights), 3.00 GB of memory"
    )
    assert str(Estimate(50.0, 10**8, 10**9)) == "about 50 seconds (0.8 minutes a billion weights), 100 MB of memory"


@pytest.mark.parametrize(
    ("speed", "rule"),
    [
        (Speed(1e11, 1e9), "rule compensated with aligned neurons on cpu: about "),
        # Ten times as much is computed of elements where mates are aligned.
        (Speed(1e11, 3e4), "rule compensated on cpu: about "),
        (Speed(1e3, 1e9), "rule saliency on cpu: about "),
    ],
)
def test_the_machine_decides_what_is_left_open_and_the_cost_is_said_first(
    speed: Speed, rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build_tiny("mixtral", tmp_path / "source")
    (tmp_path / "text").write_text("apples and pears, " * 4)
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(Speed, "measure", lambda device: speed)
    monkeypatch.setattr("vllm_puzzle.offline.conversion.estimate.MINUTES_IN_ALL", 1.0)
    sentences: list[str] = []

    def report(sentence: str) -> None:
        # Nothing stands there yet, under its own name or another.
        if sentence.startswith("rule "):
            assert sorted(path.name for path in tmp_path.iterdir()) == before
        sentences.append(sentence)

    options = ConvertOptions(calibration=tmp_path / "text")
    convert(source, tmp_path / "packed", options, report, lambda done, total: None)
    assert sentences[0].startswith(rule)
    assert (tmp_path / "packed").is_dir()
