"""The quantization config: what vLLM asks about a checkpoint with `quant_method: puzzlemoe`."""

from typing import Any

import torch

from ..format import (
    QUANT_METHOD,
    FormatError,
    LayerCodes,
    LayerSlots,
    PuzzleMoEQuantizationConfig,
    check_packed_names,
    is_expert_tensor,
    is_outside,
    layer_index,
)
from ..model_tensors import check_dense_tensors, dense_tensors, empty_model, is_defined, is_draft
from .host import (
    LinearBase,
    QuantizationConfig,
    QuantizeMethodBase,
    RoutedExperts,
    UnquantizedLinearMethod,
    logger,
)
from .tensor_index import Shapes, read_shapes


class PuzzleMoEConfig(QuantizationConfig):
    """`quantization_config` of a packed checkpoint, as vLLM's QuantizationConfig."""

    def __init__(self, quantization: PuzzleMoEQuantizationConfig | None = None) -> None:
        super().__init__()
        if quantization is None:
            # vLLM constructs it so where --quantization is given for a model whose config.json has no such section.
            raise ValueError(
                "this model's experts are not packed: its config.json has no quantization_config of quant_method "
                "puzzlemoe; run `vllm-puzzle convert MODEL PACKED` and serve PACKED"
            )
        self.quantization = quantization
        self._num_hidden_layers: int | None = None
        self._hf_config: Any = None

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
        """Checks a checkpoint's tensor names before anything is loaded.

        vLLM's loader skips expert tensors that it cannot place without a word, so those the slots do not account for
        have to be found here. It leaves every parameter of a quantized model that the checkpoint lacks as it was
        allocated; packed ones are counted again while loading, all others here alone.

        Raises:
            FormatError: a tensor that is missing, misshapen or unexpected, by name, or a broken index or shard.
        """
        self._hf_config = hf_config
        # Of a model that sees or hears, the part that writes text.
        text: Any = hf_config if hf_config is None else hf_config.get_text_config()
        self._num_hidden_layers = getattr(text, "num_hidden_layers", None)
        for config in (hf_config, text):
            if getattr(config, "_experts_implementation", None) == QUANT_METHOD:
                # Plain transformers is to refuse, having no kernels for packed experts. With --model-impl transformers
                # the experts are vLLM's.
                config._experts_implementation = None
        self.check_tensors(model_name, revision)

    def check_tensors(self, model_name: str, revision: str | None) -> None:
        """Checks that a checkpoint has the tensors of this config's model: the packed ones and all others.

        Raises:
            FormatError: as `maybe_update_config`.
        """
        shapes = read_shapes(model_name, revision)
        if shapes:
            check_packed_names(shapes, self.quantization, model_name)
            if self._hf_config is None or is_draft(self._hf_config):
                return
            if is_defined(self._hf_config):
                self._check_dense(shapes, model_name)
            else:
                logger.warning(
                    "Whether %s lacks tensors beside its experts is not known: transformers has no model of %s",
                    model_name,
                    self._hf_config.architectures,
                )

    def _check_dense(self, shapes: Shapes, model_name: str) -> None:
        layers, plain = self._layers(), self.quantization.plain_layers
        try:
            model = empty_model(self._hf_config)
            dense = dense_tensors(model, layers)
            experts = {layer: dict(dense_tensors(model, layers, [layer]).items() - dense.items()) for layer in plain}
        except FormatError as error:
            # vLLM's own model may well take what transformers' does not.
            logger.warning("Whether %s lacks tensors beside its experts is not known: %s", model_name, error)
            return
        for layer, names in experts.items():
            elsewhere = any(
                is_expert_tensor(name) and layer_index(name) == layer for name in shapes.keys() - names.keys()
            )
            # The source may have had them in another layout than the hub's.
            if not elsewhere or names.keys() & shapes.keys():
                dense |= names
        check_dense_tensors(shapes, dense, model_name, "copy or convert the checkpoint again")

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, RoutedExperts):
            # Imported late: the operators are needed only by a process that holds such a layer.
            from .coded_method import CodedMethod
            from .pairs_method import PairsMethod
            from .refusals import refuse_unsupported_plain

            experts = self._experts(prefix)
            if experts is None:
                refuse_unsupported_plain(layer)
                # Leaves the layer's experts to vLLM, as they are.
                return None
            if isinstance(experts, LayerCodes):
                return CodedMethod(experts, self, layer)
            return PairsMethod(experts, self, layer)
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod()
        return None

    def _experts(self, prefix: str) -> LayerSlots | LayerCodes | None:
        """How the layer's experts are stored; None for those that stay as they were.

        These are plain layers, and layers that only predict further tokens.
        """
        index = layer_index(prefix)
        # Of a drafting model vLLM says that it has no decoder layers, or as many as the model that it drafts for.
        after = index is not None and self._num_hidden_layers is not None and index >= self._num_hidden_layers
        if after or is_outside(prefix) or index in self.quantization.plain_layers:
            return None
        experts = None if index is None else self.quantization.layer(index) or self.quantization.coded_layer(index)
        if experts is None:
            raise FormatError(
                f"{prefix} has routed experts, but quantization_config lists layers {self._layers()} only; convert "
                f"again"
            )
        return experts

    @property
    def is_even(self) -> bool:
        """Whether the model's experts are all stored in tensors of the same sizes.

        Expert-parallel load balancing needs it: it moves the experts of every layer through buffers of the first one's
        sizes (vllm/distributed/eplb/eplb_state.py, `expert_buffer`).
        """
        widths = {
            bits for codes in self.quantization.coded_layers for bits in zip(codes.w13_bits, codes.w2_bits, strict=True)
        }
        return len(widths) == 1 and not self.quantization.layers and not self.quantization.plain_layers

    def _layers(self) -> list[int]:
        """The decoder layers with routed experts, however they are stored."""
        stored: list[LayerSlots | LayerCodes] = [*self.quantization.layers, *self.quantization.coded_layers]
        return sorted([each.layer for each in stored] + self.quantization.plain_layers)
