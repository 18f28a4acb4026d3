import logging
from typing import Any


class _Once(logging.LoggerAdapter):  # type: ignore[type-arg]
    """A logger with vLLM's methods that say a thing once."""

    _said: set[Any] = set()  # noqa: RUF012

    def info_once(self, text: str, *values: object, **options: object) -> None:
        if (text, values) not in self._said:
            self._said.add((text, values))
            self.info(text, *values)

    debug_once = warning_once = info_once


def init_logger(name: str) -> _Once:
    return _Once(logging.getLogger(name), {})
