"""Every unit of a conversion, those of an earlier run included, with the calibration tokens' path between them."""

from collections.abc import Generator
from contextlib import closing

from ..merging.layer import ExpertWeights, LayerTokens
from ..progress import Report
from .calibration_walk import CalibrationWalk
from .job import Job
from .journal import Journal
from .options import Workers
from .units import Unit, UnitResult, write_unit
from .workers import write_units


class _Tokens:
    """The calibration tokens on their path from unit to unit, kept in the journal so that a later run can resume.

    There are none where no text was given.
    """

    def __init__(self, job: Job, journal: Journal, done: int) -> None:
        """`done` is how many units are written already."""
        self._job = job
        self._journal = journal
        self._idle: dict[int, list[str]] = {}
        self._walk: CalibrationWalk | None = None
        if job.calibrator is not None:
            self._walk = CalibrationWalk(job.calibrator, job.method.sequential)
            if done:
                self._walk.restore(journal.load_states(done))

    def enter(self, unit: Unit) -> LayerTokens | None:
        """What a unit's experts see; None where there are none, or no text."""
        tokens = None
        if self._walk is not None and unit.layer is not None:
            tokens = self._walk.enter(unit.layer, self._job.stored_experts(unit.layer))
        if tokens is not None and tokens.idle_experts:
            self._idle[unit.number] = [self._describe_idle(unit, tokens)]
        if not self._job.method.sequential:
            self._save(unit)
        return tokens

    def write(self, unit: Unit) -> UnitResult:
        """Writes a unit in this process, and carries the tokens through what its experts became."""
        tokens, directory = self.enter(unit), self._journal.directory
        if not self._job.method.sequential:
            return write_unit(self._job, unit, directory, tokens)
        if self._walk is None or unit.layer is None or tokens is None:
            result = write_unit(self._job, unit, directory, tokens)
        else:
            converted = ExpertWeights.unread(self._job.shape.num_experts, self._job.activation)
            result = write_unit(self._job, unit, directory, tokens, converted)
            self._walk.leave(unit.layer, tokens, converted)
        self._save(unit)
        return result

    def take_idle(self, unit: Unit) -> list[str]:
        """The sentences about a unit's experts that saw no token."""
        return self._idle.pop(unit.number, [])

    def _save(self, unit: Unit) -> None:
        if self._walk is not None:
            self._journal.save_states(unit.number + 1, self._walk.states)

    def _describe_idle(self, unit: Unit, tokens: LayerTokens) -> str:
        return (
            f"layer {unit.layer}: experts {list(tokens.idle_experts)} saw no calibration token, so "
            f"{self._job.method.idle_consequence}; calibrate on more text"
        )


def write_all(
    job: Job, units: list[Unit], journal: Journal, workers: Workers, report: Report
) -> Generator[tuple[Unit, UnitResult], None, None]:
    """Every unit in its order, as soon as it is written and recorded.

    Raises:
        CheckpointError, OSError: as `write_unit`.
    """
    done = 0
    while (recorded := journal.find(f"unit {done}")) is not None:
        for sentence in recorded["idle"]:
            report(sentence)
        yield units[done], UnitResult.from_json(recorded, job.method)
        done += 1
    left = units[done:]
    if not left:
        return
    tokens = _Tokens(job, journal, done)
    if workers.are_others:
        written = write_units(job, left, journal.directory, tokens.enter, workers)
    else:
        written = ((unit, tokens.write(unit)) for unit in left)
    with closing(written):
        for unit, result in written:
            idle = tokens.take_idle(unit)
            journal.record(f"unit {unit.number}", {**result.to_json(), "idle": idle})
            journal.drop_states(unit.number)
            for sentence in idle:
                report(sentence)
            yield unit, result
