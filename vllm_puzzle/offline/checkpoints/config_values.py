"""The values of a config that are computed with, each checked when it is read."""

import math
from dataclasses import dataclass
from typing import Any

from transformers.activations import ACT2FN

from ..errors import CheckpointError

# A slip of the pen, not a size: beyond it no list as long as this can be made.
_LARGEST = 1 << 40


@dataclass(frozen=True)
class ConfigValues:
    """A transformers config and where it stands, for the sentence in which a value is refused.

    What transformers declares with a type it has checked already, but neither ranges, nor what may be null, nor what it
    does not know itself.
    """

    config: Any
    where: str

    def integer(self, name: str, least: int = 1, most: int = _LARGEST, default: int | None = None) -> int:
        """Raises CheckpointError where the value is none, or outside `least` to `most`."""
        value = getattr(self.config, name, default)
        if type(value) is not int or not least <= value <= most:
            wanted = f"an integer from {least} to {most}" if most < _LARGEST else f"an integer of at least {least}"
            raise self._error(name, value, wanted)
        return value

    def optional_integer(self, name: str, least: int = 1, most: int = _LARGEST) -> int | None:
        """The same where null, or nothing, is a value too."""
        return None if getattr(self.config, name, None) is None else self.integer(name, least, most)

    def number(self, name: str) -> float:
        """Raises CheckpointError where the value is not a finite number."""
        value = getattr(self.config, name)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self._error(name, value, "a finite number")
        return float(value)

    def integers(self, name: str) -> list[int]:
        """Raises CheckpointError where the value is not a list of integers."""
        value = getattr(self.config, name)
        if not isinstance(value, list) or any(type(each) is not int for each in value):
            raise self._error(name, value, "a list of integers")
        return value

    def activation(self, name: str) -> str:
        """Raises CheckpointError where transformers knows no activation of that name."""
        value = getattr(self.config, name)
        if not isinstance(value, str) or value not in ACT2FN:
            raise self._error(name, value, "the name of an activation that transformers knows, as silu")
        return value

    def _error(self, name: str, value: object, wanted: str) -> CheckpointError:
        own = getattr(self.config, "attribute_map", {}).get(name, name)
        return CheckpointError(f"{self.where} has {own} {value!r} where {wanted} is expected; correct it")
