"""The MoE method of a layer of packed pairs."""

from collections.abc import Sequence
from typing import Any

import torch

from ..format import FormatError, LayerSlots, word_layout
from ..kernels import choose_engine
from .config import PuzzleMoEConfig
from .host import RoutedExperts
from .loader import PackedExpertLoader
from .method import PuzzleMoEMethod, serving_device


class PairsMethod(PuzzleMoEMethod):
    """Packed pairs, whose words one operator reads for both experts of a slot.

    Raises:
        EngineError: the environment asks for an engine that cannot be had.
        FormatError: expert parallelism would split a pair; and what PuzzleMoEMethod raises.
    """

    stored_as = "packed pairs"

    def __init__(self, slots: LayerSlots, config: PuzzleMoEConfig, layer: RoutedExperts) -> None:
        layout = word_layout(config.quantization.bits)
        engine = choose_engine(serving_device(), layer.moe_config.in_dtype, layout)
        unsupported = {
            "expert-parallel load balancing (--enable-eplb)": layer.moe_config.moe_parallel_config.enable_eplb,
            "round-robin expert placement (--expert-placement-strategy)": layer.expert_placement_strategy
            == "round_robin",
        }
        super().__init__(config, layer, slots.num_experts, engine, unsupported)
        self._slots = slots
        expert_map = layer.expert_map_manager.expert_map
        local = None if expert_map is None else {i for i, here in enumerate(expert_map.tolist()) if here >= 0}
        try:
            self._local_slots = slots.local_slots(local)
        except FormatError as error:
            raise FormatError(
                f"{error}; use a number of ranks that divides {config.quantization.max_expert_parallel}, or convert "
                f"again with a larger --max-expert-parallel"
            ) from None

    def _allocate(self, layer: RoutedExperts, intermediate_size: int) -> Sequence[PackedExpertLoader]:
        loader = PackedExpertLoader(
            layer.layer_name,
            self._slots,
            self._local_slots,
            self._projections(layer),
            self._rank(),
            self._abandon_reload,
        )
        hidden_size, num_slots = self._quantization.hidden_size, len(self._local_slots)
        # Zeros, since load_format=dummy fills floating parameters only and any other bits could be infinities.
        w13, w2 = self._engine.allocate(num_slots, hidden_size, intermediate_size)
        num_loaded = num_slots * intermediate_size * hidden_size
        self._register(layer, "w13_weight_packed", w13, loader, 2 * num_loaded)
        self._register(layer, "w2_weight_packed", w2, loader, num_loaded)
        self._register_table(layer, "slot_of_expert", self._slots.slot_of_expert(self._local_slots))
        return (loader,)

    def _prepare(self, layer: RoutedExperts) -> None:
        w13, w2 = layer.w13_weight_packed, layer.w2_weight_packed
        self._engine.prepare(w13, w2, self._max_num_tokens, self.moe.experts_per_token)
        for name in ("w13_weight_packed", "w2_weight_packed"):
            slot = self._engine.check(getattr(layer, name), self.moe.in_dtype)
            if slot is not None:
                expert = self._slots.first_member(self._local_slots[slot])
                raise FormatError(
                    f"{layer.layer_name}.{name} has a weight of magnitude 32768 or more in the slot of expert "
                    f"{expert}, which float16 cannot hold; serve with --dtype bfloat16"
                )

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
