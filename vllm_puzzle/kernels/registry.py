"""Every engine by its name. A new one is a folder beside the others and its place here."""

from .cpu import CPU_ENGINES
from .engine import Engine
from .reference import REFERENCE_ENGINE
from .triton import TRITON_ENGINE

# `auto` takes the first family that suits the device, and the reference engine suits all.
ENGINES: dict[str, Engine] = {engine.name: engine for engine in (*CPU_ENGINES, TRITON_ENGINE, REFERENCE_ENGINE)}
