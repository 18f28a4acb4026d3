def get_config() -> None:
    """No configuration overrides the tuned files."""
