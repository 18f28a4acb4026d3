"""The MoE method of a layer of coded experts."""

from collections.abc import Sequence
from typing import Any

import torch

from ..format import LayerCodes, check_codebook
from ..kernels import CodedMatrices, choose_engine
from .coded_loader import CodebookLoader, CodedExpertLoader, CodedPart, CodesLoader, ScaleLoader
from .config import PuzzleMoEConfig
from .host import RoutedExperts
from .method import PuzzleMoEMethod, serving_device

_MATRICES = {"w13": ("w1", "w3"), "w2": ("w2",)}


class CodedMethod(PuzzleMoEMethod):
    """Coded experts: nothing ties two of them together, so any rank may hold any of them.

    Expert-parallel load balancing takes every parameter as rows of one expert each and moves them between ranks. Where
    all codes are of one width these rows are of one size, and an expert is whole in its own.

    float16 holds activations alone: a point of a codebook meets them as it is, and the scale of a row multiplies a sum
    in float32. So no weight is too large for it.

    Raises:
        EngineError: the environment asks for an engine that cannot be had, or that does not read codes.
        FormatError, NotImplementedError: as PuzzleMoEMethod.
    """

    stored_as = "codes"

    def __init__(self, codes: LayerCodes, config: PuzzleMoEConfig, layer: RoutedExperts) -> None:
        engine = choose_engine(serving_device(), layer.moe_config.in_dtype, codes=True)
        balances = layer.moe_config.moe_parallel_config.enable_eplb
        unsupported = {
            "expert-parallel load balancing (--enable-eplb) where experts differ in size or layers in kind (convert "
            "again with --even)": balances and not config.is_even
        }
        super().__init__(config, layer, codes.num_experts, engine, unsupported)
        expert_map = layer.expert_map_manager.expert_map
        if expert_map is None:
            expert_map = torch.arange(layer.global_num_experts)
        # Where each expert is, replicas included, -1 for one that is not here.
        self._expert_map = expert_map.to(device="cpu", dtype=torch.int32)
        self._part = CodedPart(
            layer.layer_name,
            codes,
            {expert: here for expert, here in enumerate(self._expert_map.tolist()) if here >= 0},
            self._projections(layer),
            self._quantization.hidden_size,
            self._quantization.intermediate_size,
            self._rank(),
        )
        # A reload has the layer's tables on the meta device, and what is loaded is found by this one.
        self._index: dict[str, torch.Tensor] = {}

    @property
    def supports_eplb(self) -> bool:
        return self._config.is_even

    def _allocate(self, layer: RoutedExperts, intermediate_size: int) -> Sequence[CodedExpertLoader]:
        part = self._part
        w13, w2 = self._engine.allocate_codes(part.widths("w1"), part.widths("w2"), part.hidden_size, intermediate_size)
        codes, codebook, scale = loaders = (
            CodesLoader(part, w13, w2, self._abandon_reload),
            CodebookLoader(part, self._abandon_reload),
            ScaleLoader(part, self._abandon_reload),
        )
        for name, matrices in (("w13", w13), ("w2", w2)):
            for suffix, tensor, loader in (
                ("packed", matrices.codes, codes),
                ("codebook", matrices.codebook, codebook),
                ("scale", matrices.scale, scale),
            ):
                num_loaded = loader.num_loaded(_MATRICES[name])
                self._register(layer, f"{name}_weight_{suffix}", tensor, loader, num_loaded)
            self._register_table(layer, f"{name}_index", matrices.index)
            self._index[name] = matrices.index.cpu()
        self._register_table(layer, "local_expert", self._expert_map)
        return loaders

    def _matrices(self, layer: RoutedExperts, name: str) -> CodedMatrices:
        codes, codebook, scale = (getattr(layer, f"{name}_weight_{each}") for each in ("packed", "codebook", "scale"))
        return CodedMatrices(codes=codes.data, index=self._index[name], codebook=codebook.data, scale=scale.data)

    def _prepare(self, layer: RoutedExperts) -> None:
        w13, w2 = self._matrices(layer, "w13"), self._matrices(layer, "w2")
        if not self._dummy_weights:
            self._check_codebooks(w13, "w1")
            self._check_codebooks(w2, "w2")
        self._engine.prepare_codes(w13, w2, self._max_num_tokens, self.moe.experts_per_token)

    def _check_codebooks(self, matrices: CodedMatrices, shard_id: str) -> None:
        """Raises FormatError where one lacks (0, 0), or where it or a scale is not finite."""
        part = self._part
        for expert, here in part.position.items():
            num_points = 1 << part.shape(expert, shard_id).bits
            name = f"{part.layer_name}.{part.source(expert)}.{part.projections[shard_id].name}.weight_codebook"
            check_codebook(matrices.codebook[here, :num_points], matrices.scale[here], name)

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        return torch.ops.vllm_puzzle.coded_moe(
            x,
            layer.w13_weight_packed,
            layer.w13_index,
            layer.w13_weight_codebook,
            layer.w13_weight_scale,
            layer.w2_weight_packed,
            layer.w2_index,
            layer.w2_weight_codebook,
            layer.w2_weight_scale,
            layer.local_expert,
            topk_weights,
            topk_ids,
            self._activation,
            layer.apply_router_weight_on_input,
            self._engine_name,
        )
