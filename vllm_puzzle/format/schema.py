"""The schema of `quantization_config` in a packed checkpoint's config.json."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from .coded_layer import LayerCodes
from .layout import FormatError
from .slots import LayerSlots
from .strict import Strict

QUANT_METHOD: Literal["puzzlemoe"] = "puzzlemoe"
FORMAT_VERSIONS = (1, 2)
"""Version 1 has packed pairs alone, version 2 coded and plain layers beside them."""

# transformers refuses a config that names an implementation of experts which it does not know. Of a quant_method that
# it does not know it only warns, and uses random experts.
_EXPERTS_KEY = "experts_implementation"
_SECTION_KEY = "quantization_config"


class Calibration(Strict):
    """The text whose activations weighed the experts against each other."""

    source: str
    sha256: str
    sequences: int = Field(gt=0)
    sequence_length: int = Field(gt=0)


class Provenance(Strict):
    """How the checkpoint was made; nothing here changes how it is read.

    `tau` is that of the rule `paper`. `bits`, a weight, and `even` were asked for of coded experts, which have
    `pairing` none and `compression` 0; they are not written in version 1.
    """

    rule: str
    tau: float | None
    align: bool
    pairing: str
    compression: float
    seed: int
    calibration: Calibration | None
    source_sha256: str
    tool_version: str
    bits: float | None = None
    even: bool | None = None


class PuzzleMoEQuantizationConfig(Strict):
    """`quantization_config`; every rule that spans fields is checked on write and on load.

    `layers` are those of packed pairs, whose words have `bits` bits, `coded_layers` those of coded experts, and
    `plain_layers` those whose experts are as they were. The last two are only in version 2.
    """

    quant_method: Literal["puzzlemoe"] = QUANT_METHOD
    format_version: Literal[1, 2] = 1
    bits: Literal[16] = 16
    num_experts: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    max_expert_parallel: int = Field(gt=0)
    layers: list[LayerSlots]
    coded_layers: list[LayerCodes] = Field(default_factory=list)
    plain_layers: list[int] = Field(default_factory=list)
    provenance: Provenance

    @model_validator(mode="after")
    def _check(self) -> "PuzzleMoEQuantizationConfig":
        kinds = {
            "layers": [layer.layer for layer in self.layers],
            "coded_layers": [layer.layer for layer in self.coded_layers],
            "plain_layers": self.plain_layers,
        }
        for field, indices in kinds.items():
            if indices != sorted(set(indices)):
                raise ValueError(f"`{field}` must be in ascending order without repetition, found {indices}")
        counts = Counter(index for indices in kinds.values() for index in indices)
        twice = sorted(index for index, count in counts.items() if count > 1)
        if twice:
            raise ValueError(f"layer {twice[0]} is in more than one of {', '.join(f'`{field}`' for field in kinds)}")
        if self.format_version == 1 and (self.coded_layers or self.plain_layers):
            raise ValueError("`coded_layers` and `plain_layers` take format_version 2")
        experts_per_rank, rest = divmod(self.num_experts, self.max_expert_parallel)
        if rest:
            raise ValueError(f"{self.num_experts} experts do not divide evenly among {self.max_expert_parallel} ranks")
        counted: list[LayerSlots | LayerCodes] = [*self.layers, *self.coded_layers]
        for each in counted:
            if each.num_experts != self.num_experts:
                raise ValueError(
                    f"layer {each.layer} lists {each.num_experts} experts, the checkpoint has {self.num_experts}"
                )
        for layer in self.layers:
            for slot in range(layer.pairs):
                first, second = layer.members(slot)
                if first // experts_per_rank != second // experts_per_rank:
                    raise ValueError(
                        f"layer {layer.layer}: experts {first} and {second} share slot {slot} "
                        f"but belong to different ranks ({experts_per_rank} to a rank)"
                    )
        return self

    @classmethod
    def parse(cls, config: Mapping[str, Any], where: str = "quantization_config") -> "PuzzleMoEQuantizationConfig":
        """Reads the section of config.json; raises FormatError, in one sentence, for anything wrong."""
        version = config.get("format_version")
        if config.get("quant_method") == QUANT_METHOD and version not in FORMAT_VERSIONS:
            raise FormatError(
                f"{where} has format_version {version!r}, this vllm-puzzle reads versions "
                f"{' and '.join(map(str, FORMAT_VERSIONS))}; install the release that wrote it, or convert the source "
                f"checkpoint again"
            )
        try:
            return cls.model_validate(dict(config))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
            raise FormatError(f"{where}{': ' + field if field else ''}: {first['msg']}{more}") from None

    def layer(self, index: int) -> LayerSlots | None:
        """The slots of decoder layer `index`, None where it has no packed pairs."""
        return next((layer for layer in self.layers if layer.layer == index), None)

    def coded_layer(self, index: int) -> LayerCodes | None:
        """The codes of decoder layer `index`, None where it has no coded experts."""
        return next((layer for layer in self.coded_layers if layer.layer == index), None)

    def to_json(self) -> dict[str, Any]:
        """The section as it is written."""
        section = self.model_dump()
        if self.format_version == 1:
            del section["coded_layers"], section["plain_layers"]
            del section["provenance"]["bits"], section["provenance"]["even"]
        return section


def is_packed(config: Any) -> bool:
    """Whether what a config.json holds is the config of a packed checkpoint."""
    quantization = config.get(_SECTION_KEY) if isinstance(config, Mapping) else None
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == QUANT_METHOD


def packed_config(plain: Mapping[str, Any], quantization: PuzzleMoEQuantizationConfig) -> dict[str, Any]:
    """config.json of a packed checkpoint, from that of its source."""
    return {**plain, _EXPERTS_KEY: QUANT_METHOD, _SECTION_KEY: quantization.to_json()}


def plain_config(packed: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without what `packed_config` adds."""
    return {
        key: value
        for key, value in packed.items()
        if key != _SECTION_KEY and (key, value) != (_EXPERTS_KEY, QUANT_METHOD)
    }
