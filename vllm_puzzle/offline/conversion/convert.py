"""The conversion: a source checkpoint in, a packed checkpoint out, one decoder layer in memory at a time."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from ..checkpoints.destination import check_destination
from ..merging.pair_loss import Mates
from ..merging.recipe import Recipe
from ..progress import Progress, Report
from ..wording import label
from .choose_pairs import ChosenPairs, choose_pairs, draw_pairs
from .estimate import Speed, choose_recipe, estimate_conversion
from .finish import finish_checkpoint
from .job import Job, LayerProgress, Setup
from .journal import Journal, check_unfinished, work_directory
from .model_card import ConvertResult
from .options import ConvertOptions
from .origin import origin_of
from .prepare import prepare
from .runner import write_all
from .units import LayerReport, UnitResult, make_units
from .work import measure_work

# The journal's name of the step that settles recipe and pairs.
_CHOICES = "plan"


def convert(
    source: Path,
    destination: Path,
    options: ConvertOptions,
    report: Report,
    progress: Progress,
    resume: bool = False,
) -> ConvertResult:
    """Writes `destination`, a packed checkpoint of `source`.

    Args:
        resume: resume an interrupted conversion to `destination`; the result is that of one that was not interrupted.

    Raises:
        CheckpointError: an option, the source or the destination is at fault; nothing was written under that name.
    """
    check_destination(destination, source)
    check_unfinished(destination, resume)
    setup = prepare(source, None if resume else destination, options, report)
    # What it costs is said before anything is written; the recipe of a conversion that is resumed is settled.
    recipe = None if resume else _choose_recipe(setup, report)
    with work_directory(destination, origin_of(setup), resume) as (writer, journal):
        settled = journal.find(_CHOICES)
        if settled is not None:
            recipe = Recipe.from_json(settled["recipe"])
        job = Job.of(setup, recipe or _choose_recipe(setup, report))
        layers = LayerProgress(job, progress)
        pairs = _settle_pairs(job, journal, layers)
        if job.chooses_pairs:
            report(_describe_mates(job, list(pairs.mates.values())))
        units = make_units(job, pairs.slots, options.shard_size)
        results: list[UnitResult] = []
        # Closed before the directory is: whoever still writes into it ends then.
        with closing(write_all(job, units, journal, options.workers, report)) as written:
            for unit, result in written:
                results.append(result)
                layers.advance(unit.layer)
        reports = _gather_reports(results, pairs)
        if not job.chooses_pairs and job.recipe.rule.estimates_loss:
            report(_describe_mates(job, [each.mates for each in reports]))
        return finish_checkpoint(job, units, results, reports, writer, label(destination))


def _choose_recipe(setup: Setup, report: Report) -> Recipe:
    """The best recipe that the options leave open and the machine can do in reasonable time; says what it will cost."""
    work, speed = measure_work(setup), Speed.measure(setup.device)
    recipes = setup.options.recipes()
    recipe, cost = choose_recipe([(recipe, estimate_conversion(recipe, work, speed)) for recipe in recipes])
    aligned = " with aligned neurons" if recipe.align else ""
    report(f"rule {recipe.rule.name}{aligned} on {setup.options.device}: {cost}")
    return recipe


def _settle_pairs(job: Job, journal: Journal, layers: LayerProgress) -> ChosenPairs:
    """The pairs of an earlier run, or else new ones, which are recorded."""
    settled = journal.find(_CHOICES)
    if settled is not None:
        for layer in job.decoder_layers if job.chooses_pairs else ():
            layers.advance(layer)
        return ChosenPairs.from_json(settled)
    pairs = choose_pairs(job, layers.advance) if job.chooses_pairs else draw_pairs(job)
    journal.record(_CHOICES, {"recipe": job.recipe.to_json(), **pairs.to_json()})
    return pairs


def _gather_reports(results: Sequence[UnitResult], pairs: ChosenPairs) -> list[LayerReport]:
    """Those of the MoE layers, with what was expected of chosen pairs when they were chosen."""
    reports = [result.report for result in results if result.report is not None]
    return [replace(each, mates=pairs.mates[each.slots.layer]) if pairs.mates else each for each in reports]


def _describe_mates(job: Job, layers: Sequence[Sequence[Mates]]) -> str:
    chosen = [each for layer in layers for each in layer]
    if not chosen:
        return "no experts are paired"
    sizes = [len(layer) for layer in layers]
    fewest, most = min(sizes), max(sizes)
    each_layer = str(most) if fewest == most else f"{fewest} to {most}"
    counts = f"pairing {job.recipe.pairing}: {len(chosen)} pairs, {each_layer} a layer"
    if job.calibrator is None:
        return counts
    loss = sum(each.loss for each in chosen) / len(layers)
    coactivation = sum(each.coactivation for each in chosen) / len(chosen)
    return (
        f"{counts}; estimated loss {loss:.3g} of the residual stream's energy a layer, mates fire together on "
        f"{coactivation:.1%} of the tokens that reach either"
    )
