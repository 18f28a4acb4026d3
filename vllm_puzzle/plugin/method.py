"""The MoE method: what vLLM calls to allocate, load and run the experts of one layer."""

import weakref
from typing import Any

import torch

from ..format import FormatError, LayerSlots, word_layout
from ..kernels import choose_engine
from .config import PuzzleMoEConfig
from .host import FusedMoEMethodBase, RoutedExperts, current_platform, get_current_vllm_config, logger
from .loader import PackedExpertLoader, Projection
from .lora import refuse_expert_adapters
from .recovery import Recovery
from .refusals import refuse_to_save, refuse_unsupported
from .reload import PackedParameter, check_checkpoint


class PuzzleMoEMethod(FusedMoEMethodBase):
    """Packed experts behind vLLM's FusedMoEMethodBase; the runner does routing, reductions and shared experts.

    Raises:
        NotImplementedError: the model or its configuration needs something that is not supported, by name.
        EngineError: the environment asks for an engine that cannot be had.
        FormatError: expert parallelism would split a pair, or the sizes are not the checkpoint's.
    """

    def __init__(self, slots: LayerSlots, config: PuzzleMoEConfig, layer: RoutedExperts) -> None:
        super().__init__(layer.moe_config)
        self._config, quantization = config, config.quantization
        device, layout = torch.device(current_platform.device_type), word_layout(quantization.bits)
        self._engine = choose_engine(device, layer.moe_config.in_dtype, layout)
        self._engine_name = self._engine.name
        vllm_config = get_current_vllm_config()
        refuse_unsupported(layer, self._engine, vllm_config)
        refuse_to_save(layer)
        if layer.moe_config.is_lora_enabled:
            refuse_expert_adapters()
        if layer.global_num_experts != slots.num_experts:
            raise FormatError(
                f"{layer.layer_name} has {layer.global_num_experts} experts, quantization_config packs "
                f"{slots.num_experts}"
            )
        self._slots = slots
        self._quantization = quantization
        self._activation = layer.activation.value
        expert_map = layer.expert_map_manager.expert_map
        local = None if expert_map is None else {i for i, here in enumerate(expert_map.tolist()) if here >= 0}
        try:
            self._local_slots = slots.local_slots(local)
        except FormatError as error:
            raise FormatError(
                f"{error}; use a number of ranks that divides {quantization.max_expert_parallel}, or convert again "
                f"with a larger --max-expert-parallel"
            ) from None
        self._loader: PackedExpertLoader | None = None
        self._reloading = False
        self._recovery = Recovery.of(config, vllm_config)
        # Weakly, as vLLM keeps what it knows of a layer only as long as the layer lives, and parameters lead here.
        self._layer = weakref.ref(layer)
        self._model_config = vllm_config.model_config
        self._served = vllm_config.model_config.model
        self._dummy_weights = vllm_config.load_config.load_format == "dummy"
        self._max_num_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        logger.info_once("Routed experts run from packed pairs on the engine %s.", self._engine_name)

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
        self._loader = self._make_loader(layer)
        num_slots = len(self._local_slots)
        # Zeros, since load_format=dummy fills floating parameters only and any other bits could be infinities.
        w13, w2 = self._engine.allocate(num_slots, hidden_size, intermediate_size_per_partition)
        loaded = num_slots * intermediate_size_per_partition * hidden_size
        for name, words, numel in (("w13_weight_packed", w13, 2 * loaded), ("w2_weight_packed", w2, loaded)):
            layer.register_parameter(name, PackedParameter(words, self._loader, numel, self._begin_reload))
        table = self._slots.slot_of_expert(self._local_slots).to(layer.w13_weight_packed.device)
        # The table follows from the config, and a reload does not wait for it.
        table.weight_loader_numel = 0  # type: ignore[attr-defined]
        layer.register_buffer("slot_of_expert", table, persistent=False)

    def _make_loader(self, layer: RoutedExperts) -> PackedExpertLoader:
        hidden, intermediate = self._quantization.hidden_size, self._quantization.intermediate_size
        return PackedExpertLoader(
            layer_name=layer.layer_name,
            slots=self._slots,
            local_slots=self._local_slots,
            projections={
                "w1": Projection(layer.ckpt_gate_proj_name, (intermediate, hidden)),
                "w3": Projection(layer.ckpt_up_proj_name, (intermediate, hidden)),
                "w2": Projection(layer.ckpt_down_proj_name, (hidden, intermediate)),
            },
            tp_rank=self.moe.tp_rank,
            tp_size=self.moe.tp_size,
            failed=self._abandon_reload,
        )

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Puts the words into the engine's order.

        Raises:
            FormatError: a packed tensor was not loaded, unless the weights are dummies, or a word cannot be decoded to
                the dtype of the activations.
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
        assert self._loader is not None
        if not self._dummy_weights:
            self._loader.finish()
        if self._reloading:
            # Again: a layer that was taken away is on the meta device already and was not asked when this began.
            self._check_checkpoint()
        w13, w2 = layer.w13_weight_packed, layer.w2_weight_packed
        self._engine.prepare(w13, w2, self._max_num_tokens, self.moe.experts_per_token)
        self._check_words(layer)

    def _begin_reload(self) -> None:
        """Raises FormatError where the checkpoint is not this model's; the engine then runs on as it did."""
        layer = self._layer()
        assert self._loader is not None
        assert layer is not None
        self._loader.start()
        self._recovery.begin(layer, self._check_checkpoint)
        self._reloading = True

    def _check_checkpoint(self) -> None:
        check_checkpoint(self._model_config, self._config, required=self._model_config.model != self._served)

    def _abandon_reload(self) -> None:
        """Leaves the model to a later reload where this one ends halfway, with words of two checkpoints in it."""
        layer = self._layer()
        if self._reloading and layer is not None:
            self._recovery.take_away(layer)

    def _check_words(self, layer: RoutedExperts) -> None:
        for name in ("w13_weight_packed", "w2_weight_packed"):
            slot = self._engine.check(getattr(layer, name), self.moe.in_dtype)
            if slot is not None:
                expert = self._slots.first_member(self._local_slots[slot])
                raise FormatError(
                    f"{layer.layer_name}.{name} has a weight of magnitude 32768 or more in the slot of expert "
                    f"{expert}, which float16 cannot hold; serve with --dtype bfloat16"
                )

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        return torch.ops.vllm_puzzle.packed_moe(
            x,
            layer.w13_weight_packed,
            layer.w2_weight_packed,
            layer.slot_of_expert,
            topk_weights,
            topk_ids,
            self._activation,
            layer.apply_router_weight_on_input,
            self._engine_name,
        )
