"""The quantization config: what vLLM asks about a checkpoint with `quant_method: puzzlemoe`."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .format import (
    QUANT_METHOD,
    FormatError,
    LayerSlots,
    PuzzleMoEQuantizationConfig,
    check_packed_names,
    is_outside,
    layer_index,
)
from .host import (
    LinearBase,
    QuantizationConfig,
    QuantizeMethodBase,
    RoutedExperts,
    UnquantizedLinearMethod,
)


class PuzzleMoEConfig(QuantizationConfig):
    """`quantization_config` of format version 1, as vLLM's QuantizationConfig."""

    def __init__(self, quantization: PuzzleMoEQuantizationConfig | None = None) -> None:
        super().__init__()
        if quantization is None:
            # vLLM constructs it so where --quantization is given for a model whose config.json has no such section.
            raise ValueError(
                "this model's experts are not packed: its config.json has no quantization_config of quant_method "
                "puzzlemoe; run `python -m vllm_puzzle.convert MODEL DEST` and serve DEST"
            )
        self.quantization = quantization
        self._num_hidden_layers: int | None = None

    @classmethod
    def get_name(cls) -> str:
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        # The first CUDA architecture with BF16 arithmetic.
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PuzzleMoEConfig":
        """Raises FormatError (a ValueError) for a section that breaks the schema."""
        return cls(PuzzleMoEQuantizationConfig.parse(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Checks a local checkpoint's tensor names before anything is loaded.

        vLLM's loader skips expert tensors that it cannot place without a word, so those the slots do not account for
        have to be found here. What is missing is found again while loading, for checkpoints that come from a hub too.

        Raises:
            FormatError: a packed tensor that is missing or unexpected, by name.
        """
        self._num_hidden_layers = getattr(hf_config, "num_hidden_layers", None)
        directory = Path(model_name)
        names = _tensor_names(directory) if directory.is_dir() else []
        if names:
            check_packed_names(names, self.quantization, model_name)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, RoutedExperts):
            # Imported late: the operator is needed only by a process that holds such a layer.
            from .moe_method import PuzzleMoEMethod

            slots = self._slots(prefix)
            # None leaves the layer's experts to vLLM, as they are.
            return None if slots is None else PuzzleMoEMethod(slots, self.quantization, layer)
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod()
        return None

    def _slots(self, prefix: str) -> LayerSlots | None:
        """None for layers that only predict further tokens, after the decoder's or beside the model: they stay BF16."""
        index = layer_index(prefix)
        # Of a drafting model vLLM says that it has no decoder layers, or as many as the model that it drafts for.
        after = index is not None and self._num_hidden_layers is not None and index >= self._num_hidden_layers
        if after or is_outside(prefix):
            return None
        slots = None if index is None else self.quantization.layer(index)
        if slots is None:
            packed = [each.layer for each in self.quantization.layers]
            raise FormatError(
                f"{prefix} has routed experts, but quantization_config packs layers {packed} only; convert again"
            )
        return slots


def _tensor_names(directory: Path) -> list[str]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return list(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    names: list[str] = []
    for shard in sorted(directory.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            names += file.keys()
    return names
