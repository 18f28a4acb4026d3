"""The packed-expert format: bit layout, words, slots, names and the schema of `quantization_config`.

Torch and pydantic only; `docs/format.md` is its specification in prose.
"""

from .activations import ACTIVATIONS
from .layout import WORD16, FormatError, WordLayout, word_layout
from .names import PACKED_SUFFIX, check_packed_names, is_outside, layer_index, packed_name, parse_packed_name
from .schema import (
    FORMAT_VERSION,
    QUANT_METHOD,
    Calibration,
    Provenance,
    PuzzleMoEQuantizationConfig,
    is_packed,
    packed_config,
    plain_config,
)
from .slots import LayerSlots, default_max_expert_parallel
from .strict import Strict
from .weight_map import INDEX_FILE, parse_weight_map
from .words import check_storable, find_invalid_word, nearest_magnitude, pack, pack_single, unpack

__all__ = [
    "ACTIVATIONS",
    "FORMAT_VERSION",
    "INDEX_FILE",
    "PACKED_SUFFIX",
    "QUANT_METHOD",
    "WORD16",
    "Calibration",
    "FormatError",
    "LayerSlots",
    "Provenance",
    "PuzzleMoEQuantizationConfig",
    "Strict",
    "WordLayout",
    "check_packed_names",
    "check_storable",
    "default_max_expert_parallel",
    "find_invalid_word",
    "is_outside",
    "is_packed",
    "layer_index",
    "nearest_magnitude",
    "pack",
    "pack_single",
    "packed_config",
    "packed_name",
    "parse_packed_name",
    "parse_weight_map",
    "plain_config",
    "unpack",
    "word_layout",
]
