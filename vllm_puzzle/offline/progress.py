"""How a command says what it is doing."""

from collections.abc import Callable

Report = Callable[[str], None]
"""Takes one sentence for the user."""

Progress = Callable[[int, int], None]
"""Takes the number of bytes done since the last call, and the number in all."""
