"""Paths on the command line."""

import argparse
from pathlib import Path


def given_path(text: str) -> Path:
    """A path that is not empty: `Path("")` would be the current folder, as from a shell variable without a value."""
    return Path(given_text(text))


def given_text(text: str) -> str:
    """A text that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; give a path")
    return text
