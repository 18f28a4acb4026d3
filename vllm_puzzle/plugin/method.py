"""The MoE method: what vLLM calls to allocate, load and run the experts of one layer, whatever they are stored as."""

import weakref
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from ..format import FormatError
from ..kernels import Engine
from .config import PuzzleMoEConfig
from .host import FusedMoEMethodBase, RoutedExperts, current_platform, get_current_vllm_config, logger
from .loader import ExpertLoader, Projection, Rank
from .lora import refuse_expert_adapters
from .recovery import Recovery
from .refusals import Unsupported, refuse_to_save, refuse_unsupported
from .reload import PackedParameter, check_checkpoint


class PuzzleMoEMethod(FusedMoEMethodBase):
    """Experts of this package behind vLLM's FusedMoEMethodBase; the runner does routing, reductions and shared experts.

    A subclass is what one layer is stored as: it allocates and runs it, and says how it is loaded.

    Raises:
        NotImplementedError: the model or its configuration needs something that is not supported, by name.
        FormatError: the sizes are not the checkpoint's.
    """

    stored_as: str
    """What the log calls the layer's experts."""

    def __init__(
        self,
        config: PuzzleMoEConfig,
        layer: RoutedExperts,
        num_experts: int,
        engine: Engine,
        unsupported: Unsupported,
    ) -> None:
        """`unsupported` is what experts of this kind alone do not have, and whether it is asked for."""
        super().__init__(layer.moe_config)
        self._config, self._quantization = config, config.quantization
        self._engine, self._engine_name = engine, engine.name
        vllm_config = get_current_vllm_config()
        refuse_unsupported(layer, engine, vllm_config, unsupported)
        refuse_to_save(layer)
        if layer.moe_config.is_lora_enabled:
            refuse_expert_adapters()
        if layer.moe_config.num_logical_experts != num_experts:
            raise FormatError(
                f"{layer.layer_name} has {layer.moe_config.num_logical_experts} experts, quantization_config packs "
                f"{num_experts}"
            )
        self._activation = layer.activation.value
        self._loaders: Sequence[ExpertLoader] = ()
        self._reloading = False
        self._recovery = Recovery.of(config, vllm_config)
        # Weakly, as vLLM keeps what it knows of a layer only as long as the layer lives, and parameters lead here.
        self._layer = weakref.ref(layer)
        self._model_config = vllm_config.model_config
        self._served = vllm_config.model_config.model
        self._dummy_weights = vllm_config.load_config.load_format == "dummy"
        self._max_num_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        logger.info_once("Routed experts run from %s on the engine %s.", self.stored_as, self._engine_name)

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        sizes = (hidden_size, intermediate_size_per_partition * self.moe.tp_size)
        packed = (self._quantization.hidden_size, self._quantization.intermediate_size)
        if sizes != packed:
            raise FormatError(
                f"{layer.layer_name} has hidden_size {sizes[0]} and intermediate_size {sizes[1]}, quantization_config "
                f"says {packed[0]} and {packed[1]}"
            )
        self._loaders = self._allocate(layer, intermediate_size_per_partition)

    @abstractmethod
    def _allocate(self, layer: RoutedExperts, intermediate_size: int) -> Sequence[ExpertLoader]:
        """Registers the layer's parameters and tables; returns the loaders, which count what comes.

        `intermediate_size` is this rank's.
        """

    @abstractmethod
    def _prepare(self, layer: RoutedExperts) -> None:
        """Checks what was loaded and puts it into the engine's order; raises FormatError."""

    def _register(
        self, layer: RoutedExperts, name: str, tensor: torch.Tensor, loader: ExpertLoader, num_loaded: int
    ) -> None:
        """A parameter of which so many elements come from the checkpoint; the rest is padding."""
        layer.register_parameter(name, PackedParameter(tensor, loader, num_loaded, self._begin_reload))

    def _register_table(self, layer: RoutedExperts, name: str, table: torch.Tensor) -> None:
        """A table that follows from the config, where the parameters are."""
        table = table.to(layer.w13_weight_packed.device)
        # A reload does not wait for it.
        table.weight_loader_numel = 0  # type: ignore[attr-defined]
        layer.register_buffer(name, table, persistent=False)

    def _projections(self, layer: RoutedExperts) -> dict[str, Projection]:
        hidden, intermediate = self._quantization.hidden_size, self._quantization.intermediate_size
        return {
            "w1": Projection(layer.ckpt_gate_proj_name, (intermediate, hidden)),
            "w3": Projection(layer.ckpt_up_proj_name, (intermediate, hidden)),
            "w2": Projection(layer.ckpt_down_proj_name, (hidden, intermediate)),
        }

    def _rank(self) -> Rank:
        return Rank(self.moe.tp_rank, self.moe.tp_size)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Puts what was loaded into the engine's order.

        Raises:
            FormatError: a tensor was not loaded, unless the weights are dummies, or holds what cannot be computed with.
        """
        try:
            self._process(layer)
        except FormatError:
            self._abandon_reload()
            raise
        if self._reloading:
            self._recovery.end_round(layer)
        self._reloading = False

    def _process(self, layer: RoutedExperts) -> None:
        if not self._dummy_weights:
            for loader in self._loaders:
                loader.finish()
        if self._reloading:
            # Again: a layer that was taken away is on the meta device already and was not asked when this began.
            self._check_checkpoint()
        self._prepare(layer)

    def _begin_reload(self) -> None:
        """Raises FormatError where the checkpoint is not this model's; the engine then runs on as it did."""
        layer = self._layer()
        assert layer is not None
        for loader in self._loaders:
            loader.start()
        self._recovery.begin(layer, self._check_checkpoint)
        self._reloading = True

    def _check_checkpoint(self) -> None:
        check_checkpoint(self._model_config, self._config, required=self._model_config.model != self._served)

    def _abandon_reload(self) -> None:
        """Leaves the model to a later reload where this one ends halfway, with weights of two checkpoints in it."""
        layer = self._layer()
        if self._reloading and layer is not None:
            self._recovery.take_away(layer)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None


def serving_device() -> torch.device:
    """Where this process computes."""
    return torch.device(current_platform.device_type)
