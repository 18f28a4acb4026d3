"""The one exception that the offline tools raise for what a user can mend."""


class CheckpointError(Exception):
    """What is wrong with a checkpoint, an option or a destination, where, and what to do: one sentence."""
