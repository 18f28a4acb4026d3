"""The one exception that the offline tools raise for what a user can mend."""


class CheckpointError(Exception):
    """What is wrong with a checkpoint, an option or a destination, where, and what to do: one sentence."""


def reason_of(error: Exception) -> str:
    """The message of another library's exception: its first line, or two where the first ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    # Their text alone, such as a key, says nothing.
    return f"{type(error).__name__} {reason}" if isinstance(error, LookupError | ArithmeticError) else reason
