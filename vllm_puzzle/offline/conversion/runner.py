"""Every unit of a conversion, those of an earlier run included, with the calibration tokens' way between them."""

from collections.abc import Generator
from contextlib import closing
from pathlib import Path

from ..merging.layer import ExpertWeights
from ..progress import Report
from .calibration_walk import CalibrationPass
from .job import Job
from .journal import Journal
from .options import Workers
from .units import LayerTokens, Unit, UnitResult, write_unit
from .workers import write_units

"""Takes one sentence for the user."""


class _Calibration:
    """The tokens on their way, kept in the journal so that the next run can go on; nothing where there is no text."""

    def __init__(self, job: Job, units: list[Unit], journal: Journal, done: int) -> None:
        self._job = job
        self._units = units
        self._journal = journal
        self._idle: dict[int, list[str]] = {}
        self._tokens: CalibrationPass | None = None
        if job.calibrator is not None and done < len(units):
            self._tokens = CalibrationPass(job)
            if done:
                self._tokens.restore(journal.load_states(done))

    def enter(self, unit: Unit) -> LayerTokens | None:
        """What a unit's experts see; None where there are none, or no text."""
        if self._tokens is None:
            return None
        found = None
        if unit.layer is not None:
            found = self._tokens.enter(unit.layer)
        number = self._units.index(unit)
        self._idle[number], self._tokens.idle_experts = self._tokens.idle_experts, []
        if not self._job.recipe.rule.sequential:
            self._journal.save_states(number + 1, self._tokens.states)
        return found

    def write(self, unit: Unit, directory: Path) -> UnitResult:
        """Writes a unit in this process, and goes on."""
        tokens = self.enter(unit)
        if self._tokens is None or unit.layer is None or tokens is None or not self._job.recipe.rule.sequential:
            result = write_unit(self._job, unit, directory, tokens)
        else:
            merged = ExpertWeights.unread(self._job.shape.num_experts, self._job.activation)
            result = write_unit(self._job, unit, directory, tokens, merged)
            self._tokens.leave(unit.layer, tokens, merged)
        if self._tokens is not None and self._job.recipe.rule.sequential:
            self._journal.save_states(self._units.index(unit) + 1, self._tokens.states)
        return result

    def idle(self, number: int) -> list[str]:
        """What is to be said of a unit's experts that saw no token."""
        return self._idle.pop(number, [])


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
        yield units[done], UnitResult.from_json(recorded)
        done += 1
    calibration = _Calibration(job, units, journal, done)
    left = units[done:]
    if workers.are_others:
        written = write_units(job, left, journal.directory, calibration.enter, workers)
    else:
        written = ((unit, calibration.write(unit, journal.directory)) for unit in left)
    with closing(written):
        for number, (unit, result) in enumerate(written, start=done):
            idle = calibration.idle(number)
            journal.record(f"unit {number}", {**result.to_json(), "idle": idle})
            journal.drop_states(number)
            for sentence in idle:
                report(sentence)
            yield unit, result
