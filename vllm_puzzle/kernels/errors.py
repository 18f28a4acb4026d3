"""The one error that every engine raises."""


class EngineError(RuntimeError):
    """An engine cannot run here, or not as it was asked to."""
