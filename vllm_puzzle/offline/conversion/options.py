"""The options of a conversion, and what is chosen where one is left open."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..defaults import (
    CODE_RULE,
    DEFAULT_DEVICE,
    DEFAULT_JOBS,
    DEFAULT_PAIRING,
    DEFAULT_SEED,
    DEFAULT_SEQUENCES,
    DEFAULT_SHARD_SIZE,
    DEFAULT_TAU,
)
from ..errors import CheckpointError
from ..merging.recipe import PAIRINGS, Recipe
from ..merging.rules import BEST_FIRST, RULES

_LEAST_BITS, _MOST_BITS = 2, 4

# The options that say nothing of codes.
_FOR_PAIRS = ("compression", "pairing", "align", "tau", "max_expert_parallel")


@dataclass(frozen=True)
class Workers:
    """`jobs` units are written at once, by the Ray cluster at the address `ray` or by processes of this machine."""

    jobs: int
    ray: str | None = None

    @property
    def are_others(self) -> bool:
        """Whether other processes than this one write units."""
        return self.jobs > 1 or self.ray is not None


@dataclass(frozen=True)
class ConvertOptions:
    """The command line's options, by the same names.

    `max_expert_parallel` None takes `default_max_expert_parallel`; `calibration` None weighs by magnitude alone;
    `rule` and `align` None take the best that the machine can do in reasonable time, see `choose_method`; `tau` None is
    DEFAULT_TAU for the rule that reads it, and any other is refused for the rules that do not; `pairing` and
    `compression` None take DEFAULT_PAIRING and DEFAULT_COMPRESSION. `bits` a weight, None for pairs, asks for codes, to
    which no option of pairs belongs; with `even` the experts of a layer have codes of one width. `shard_size` is in
    bytes; `jobs`, the number of layers at once, and `ray`, the address of the cluster that converts them, change
    nothing that is written.

    Raises:
        CheckpointError: an option is out of its range, or two do not go together.
    """

    calibration: Path | None = None
    calibration_sequences: int = DEFAULT_SEQUENCES
    rule: str | None = None
    tau: float | None = None
    align: bool | None = None
    pairing: str | None = None
    compression: float | None = None
    bits: float | None = None
    even: bool = False
    max_expert_parallel: int | None = None
    seed: int = DEFAULT_SEED
    device: str = DEFAULT_DEVICE
    shard_size: int = DEFAULT_SHARD_SIZE
    jobs: int = DEFAULT_JOBS
    ray: str | None = None

    def __post_init__(self) -> None:
        if self.rule is not None and self.rule not in (*RULES, CODE_RULE):
            raise CheckpointError(f"--rule {self.rule} is not known; choose one of {[*RULES, CODE_RULE]}")
        if self.pairing is not None and self.pairing not in PAIRINGS:
            raise CheckpointError(f"--pairing {self.pairing} is not known; choose one of {list(PAIRINGS)}")
        if self.tau is not None and not 0 <= self.tau <= 1:
            raise CheckpointError(f"--tau {self.tau:g} is outside 0 to 1; the paper uses {DEFAULT_TAU} for every model")
        if self.compression is not None and not 0 <= self.compression <= 50:
            raise CheckpointError(
                f"--compression {self.compression:g} is outside 0 to 50; a pair takes the place of one expert, "
                f"so 50 is the most"
            )
        if self.calibration_sequences < 1:
            raise CheckpointError(f"--calibration-sequences {self.calibration_sequences} is not at least 1")
        if self.max_expert_parallel is not None and self.max_expert_parallel < 1:
            raise CheckpointError(f"--max-expert-parallel {self.max_expert_parallel} is not at least 1")
        if self.shard_size < 1:
            raise CheckpointError(f"--shard-size {self.shard_size} is not at least 1 byte")
        if self.jobs < 1:
            raise CheckpointError(f"--jobs {self.jobs} is not at least 1")
        if self.pairing == "coactivation" and self.calibration is None:
            raise CheckpointError("--pairing coactivation needs to see tokens; give --calibration FILE")
        if self.bits is not None:
            self._check_codes(self.bits)
        elif self.even or self.rule == CODE_RULE:
            option = "--even" if self.even else f"--rule {CODE_RULE}"
            raise CheckpointError(f"{option} is for codes; give --bits B, from {_LEAST_BITS} to {_MOST_BITS}, too")
        else:
            self._check_pairs()

    def _check_codes(self, bits: float) -> None:
        if not _LEAST_BITS <= bits <= _MOST_BITS:
            raise CheckpointError(
                f"--bits {bits:g} is outside {_LEAST_BITS} to {_MOST_BITS}, the bits a weight that codes can have"
            )
        given = {name: getattr(self, name) for name in _FOR_PAIRS if getattr(self, name) is not None}
        if self.rule not in (None, CODE_RULE):
            given = {"rule": self.rule, **given}
        if given:
            name, value = next(iter(given.items()))
            option = f"--{name.replace('_', '-')}"
            shown = {"True": option, "False": f"--no-{name}"}.get(str(value), f"{option} {value}")
            raise CheckpointError(f"{shown} is for pairs, and --bits {bits:g} asks for codes; leave out one of the two")
        if self.seed != DEFAULT_SEED:
            raise CheckpointError(
                f"--seed {self.seed} draws pairs, and --bits {bits:g} asks for codes; leave out one of the two"
            )
        if self.calibration is not None and self.workers.are_others:
            option = self._parallel_option
            raise CheckpointError(
                f"{option} with --bits and --calibration: there each layer makes up for those before it, so they are "
                f"coded one after the other; leave out {option.split()[0]}"
            )

    def _check_pairs(self) -> None:
        rule = RULES.get(self.rule or "")
        if self.tau is not None and not (rule and rule.reads_tau):
            readers = " or ".join(f"--rule {each.name}" for each in RULES.values() if each.reads_tau)
            raise CheckpointError(f"--tau {self.tau:g} is only used with {readers}; give that rule or leave out --tau")
        if rule is None:
            return
        if rule.sequential and self.workers.are_others:
            option = self._parallel_option
            raise CheckpointError(
                f"{option} with --rule {rule.name}: there each layer makes up for those before it, so they are merged "
                f"one after the other; leave out {option.split()[0]} or choose another rule"
            )
        if self.align and not rule.can_align:
            raise CheckpointError(
                f"--rule {rule.name} merges neurons in their own order; leave out --align or choose another rule"
            )
        if rule.needs_tokens and self.calibration is None:
            raise CheckpointError(f"--rule {rule.name} needs to see tokens; give --calibration FILE")

    @property
    def _parallel_option(self) -> str:
        return f"--jobs {self.jobs}" if self.ray is None else f"--ray {self.ray}"

    @property
    def workers(self) -> Workers:
        """The processes that merge the layers."""
        return Workers(self.jobs, self.ray)

    def torch_device(self) -> torch.device:
        """The device to compute on; raises CheckpointError where this machine has no such device."""
        try:
            device = torch.device(self.device)
        except RuntimeError:
            raise CheckpointError(f"--device {self.device} is no device of torch; give cpu or cuda") from None
        if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
            raise CheckpointError(f"--device {self.device}: this torch sees no such device; give cpu")
        return device

    def recipes(self) -> list[Recipe]:
        """The recipes for pairs that the options leave open, the best one first."""
        return [
            Recipe(rule, align, self.pairing or DEFAULT_PAIRING, DEFAULT_TAU if self.tau is None else self.tau)
            for rule in ([RULES[self.rule]] if self.rule else BEST_FIRST)
            for align in (True, False)
            if self.align in (None, align) and (rule.can_align or not align)
            if self.calibration is not None or not rule.needs_tokens
            if not (rule.sequential and self.workers.are_others)
        ]
