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
    """A transformers config, and the path of its file for the sentence in which a value is refused.

    transformers has checked the types that it declares, but no ranges, no nulls and no values that it does not know.
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
        """See `integer`; None where the value is null or missing."""
        return None if getattr(self.config, name, None) is None else self.integer(name, least, most)

    def number(self, name: str) -> float:
        """Raises CheckpointError where the value is not a finite number."""
        value: Any = getattr(self.config, name, None)
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self._error(name, value, "a finite number")
        return float(value)

    def integers(self, name: str) -> list[int]:
        """Raises CheckpointError where the value is not a list of integers."""
        value = getattr(self.config, name, None)
        if not isinstance(value, list) or any(type(each) is not int for each in value):
            raise self._error(name, value, "a list of integers")
        return value

    def activation(self, name: str) -> str:
        """The name of an activation; raises CheckpointError where transformers knows none of that name."""
        value = getattr(self.config, name, None)
        if not isinstance(value, str) or value not in ACT2FN:
            raise self._error(name, value, "the name of an activation that transformers knows, as silu")
        return value

    def _error(self, name: str, value: object, wanted: str) -> CheckpointError:
        own = getattr(self.config, "attribute_map", {}).get(name, name)
        return CheckpointError(f"{self.where} has {own} {value!r} where {wanted} is expected; correct it")
