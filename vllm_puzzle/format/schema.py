"""The schema of `quantization_config` in a packed checkpoint's config.json."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from .layout import FormatError
from .slots import LayerSlots
from .strict import Strict

QUANT_METHOD: Literal["puzzlemoe"] = "puzzlemoe"
FORMAT_VERSION: Literal[1] = 1

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
    """How the checkpoint was made; nothing here changes how it is read. `tau` is that of the rule `paper`."""

    rule: str
    tau: float | None
    align: bool
    pairing: str
    compression: float
    seed: int
    calibration: Calibration | None
    source_sha256: str
    tool_version: str


class PuzzleMoEQuantizationConfig(Strict):
    """`quantization_config` of format version 1; every rule that spans fields is checked on write and on load."""

    quant_method: Literal["puzzlemoe"] = QUANT_METHOD
    format_version: Literal[1] = FORMAT_VERSION
    bits: Literal[16] = 16
    num_experts: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    max_expert_parallel: int = Field(gt=0)
    layers: list[LayerSlots]
    provenance: Provenance

    @model_validator(mode="after")
    def _check(self) -> "PuzzleMoEQuantizationConfig":
        indices = [layer.layer for layer in self.layers]
        if indices != sorted(set(indices)):
            raise ValueError(f"`layers` must be in ascending order without repetition, found {indices}")
        experts_per_rank, rest = divmod(self.num_experts, self.max_expert_parallel)
        if rest:
            raise ValueError(f"{self.num_experts} experts do not divide evenly among {self.max_expert_parallel} ranks")
        for layer in self.layers:
            if layer.num_experts != self.num_experts:
                raise ValueError(
                    f"layer {layer.layer} lists {layer.num_experts} experts, the checkpoint has {self.num_experts}"
                )
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
        if config.get("quant_method") == QUANT_METHOD and version != FORMAT_VERSION:
            raise FormatError(
                f"{where} has format_version {version!r}, this vllm-puzzle reads version {FORMAT_VERSION}; "
                f"install the release that wrote it, or convert the source checkpoint again"
            )
        try:
            return cls.model_validate(dict(config))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
            raise FormatError(f"{where}{': ' + field if field else ''}: {first['msg']}{more}") from None

    def layer(self, index: int) -> LayerSlots | None:
        """The slots of decoder layer `index`, None where it has no packed experts."""
        return next((layer for layer in self.layers if layer.layer == index), None)


def is_packed(config: Any) -> bool:
    """Whether what a config.json holds is the config of a packed checkpoint."""
    quantization = config.get(_SECTION_KEY) if isinstance(config, Mapping) else None
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == QUANT_METHOD


def packed_config(plain: Mapping[str, Any], quantization: PuzzleMoEQuantizationConfig) -> dict[str, Any]:
    """config.json of a packed checkpoint, from that of its source."""
    return {**plain, _EXPERTS_KEY: QUANT_METHOD, _SECTION_KEY: quantization.model_dump()}


def plain_config(packed: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without what `packed_config` adds."""
    return {
        key: value
        for key, value in packed.items()
        if key != _SECTION_KEY and (key, value) != (_EXPERTS_KEY, QUANT_METHOD)
    }
