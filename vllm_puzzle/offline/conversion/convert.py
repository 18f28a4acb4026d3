"""The conversion: a source checkpoint in, a packed checkpoint out, one decoder layer in memory at a time."""

from contextlib import closing
from pathlib import Path

from ..checkpoints.destination import check_destination
from ..progress import Progress, Report
from ..wording import label
from .estimate import Speed, choose_method
from .finish import finish_checkpoint
from .job import Job, LayerProgress, Setup
from .journal import Journal, check_unfinished, work_directory
from .method import Choices, Method
from .model_card import ConvertResult
from .options import ConvertOptions
from .origin import origin_of
from .prepare import prepare
from .runner import write_all
from .units import UnitResult, make_units
from .work import measure_work

# The journal's name of the step that settles the method and the form of every layer's experts.
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
    # What it costs is said before anything is written; the method of a conversion that is resumed is settled.
    method = None if resume else _choose_method(setup, report)
    with work_directory(destination, origin_of(setup), resume) as (writer, journal):
        settled = journal.find(_CHOICES)
        if settled is not None:
            method = next(each for each in setup.methods if each.title == settled["title"])
        job = Job.of(setup, method or _choose_method(setup, report))
        layers = LayerProgress(job, progress)
        choices = _settle(job, journal, layers)
        _say(job.method.describe_choices(job, choices), report)
        units = make_units(job, choices.layouts, options.shard_size)
        results: list[UnitResult] = []
        # Closed before the directory is: whoever still writes into it ends then.
        with closing(write_all(job, units, journal, options.workers, report)) as written:
            for unit, result in written:
                results.append(result)
                layers.advance(unit.layer)
        reports = [choices.complete(each.report) for each in results if each.report is not None]
        _say(job.method.describe_reports(job, reports), report)
        return finish_checkpoint(job, units, results, reports, writer, label(destination))


def _choose_method(setup: Setup, report: Report) -> Method:
    """The best method that the options leave open and the machine can do in reasonable time; says what it will cost."""
    work, speed = measure_work(setup), Speed.measure(setup.device)
    method, cost = choose_method([(method, method.estimate(work, speed)) for method in setup.methods])
    report(f"{method.title} on {setup.options.device}: {cost}")
    return method


def _settle(job: Job, journal: Journal, layers: LayerProgress) -> Choices:
    """What an earlier run settled, or else new choices, which are recorded."""
    settled = journal.find(_CHOICES)
    if settled is not None:
        for layer in job.decoder_layers if job.method.surveys else ():
            layers.advance(layer)
        return job.method.read_choices(settled)
    choices = job.method.settle(job, layers.advance)
    journal.record(_CHOICES, {"title": job.method.title, **choices.to_json()})
    return choices


def _say(sentence: str | None, report: Report) -> None:
    if sentence is not None:
        report(sentence)
