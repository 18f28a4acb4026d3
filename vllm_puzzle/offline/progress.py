"""How a command says what it is doing."""

from collections.abc import Callable

Report = Callable[[str], None]
"""Takes one sentence for the user."""

Progress = Callable[[int, int], None]
"""Takes how many bytes were dealt with since the last call, and how many there are in all."""
