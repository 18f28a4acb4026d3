"""The packed-expert format: bit layout, words, slots, names and the schema of `quantization_config`.

Torch and pydantic only; `docs/format.md` is its specification in prose.
"""

from .activations import ACTIVATIONS
from .coded_layer import CodedShape, LayerCodes
from .codes import (
    CODE_BITS,
    CODES_PER_GROUP,
    check_codable,
    check_codebook,
    decode,
    join_rows,
    num_words,
    pack_codes,
    split_rows,
    unpack_codes,
    zero_code,
)
from .layout import WORD16, FormatError, WordLayout, word_layout
from .names import (
    CODEBOOK_SUFFIX,
    PACKED_SUFFIX,
    PROJECTIONS,
    SCALE_SUFFIX,
    ExpertTensor,
    check_packed_names,
    coded_tensors,
    is_expert_tensor,
    is_outside,
    layer_beginning,
    layer_index,
    packed_name,
    parse_expert_name,
    parse_packed_name,
)
from .schema import (
    FORMAT_VERSIONS,
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
    "CODEBOOK_SUFFIX",
    "CODES_PER_GROUP",
    "CODE_BITS",
    "FORMAT_VERSIONS",
    "INDEX_FILE",
    "PACKED_SUFFIX",
    "PROJECTIONS",
    "QUANT_METHOD",
    "SCALE_SUFFIX",
    "WORD16",
    "Calibration",
    "CodedShape",
    "ExpertTensor",
    "FormatError",
    "LayerCodes",
    "LayerSlots",
    "Provenance",
    "PuzzleMoEQuantizationConfig",
    "Strict",
    "WordLayout",
    "check_codable",
    "check_codebook",
    "check_packed_names",
    "check_storable",
    "coded_tensors",
    "decode",
    "default_max_expert_parallel",
    "find_invalid_word",
    "is_expert_tensor",
    "is_outside",
    "is_packed",
    "join_rows",
    "layer_beginning",
    "layer_index",
    "nearest_magnitude",
    "num_words",
    "pack",
    "pack_codes",
    "pack_single",
    "packed_config",
    "packed_name",
    "parse_expert_name",
    "parse_packed_name",
    "parse_weight_map",
    "plain_config",
    "split_rows",
    "unpack",
    "unpack_codes",
    "word_layout",
    "zero_code",
]
