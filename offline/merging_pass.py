"""Layer after layer: the calibration tokens go in, the layer is merged and packed, the tokens go on."""

from collections.abc import MutableMapping
from dataclasses import dataclass

import torch

from vllm_puzzle.format import FormatError, LayerSlots, packed_name

from .errors import CheckpointError
from .experts import layer_experts, layer_names
from .job import Job
from .layer import ExpertWeights, RoutedTokens
from .layer_merging import PackedLayer, merge_layer
from .mates import Mates
from .merging import MergeStatistics


@dataclass(frozen=True)
class LayerReport:
    """What merging did to one layer; `mates` is empty where nothing was estimated."""

    slots: LayerSlots
    statistics: MergeStatistics
    mates: list[Mates]


class MergingPass:
    """Merges a model's layers in their order.

    With the rule `compensated` the tokens take two ways at once: through the source model, and through the merged
    layers, so that each layer can make up for those before it. With the other rules the first is enough.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self.idle_experts: list[str] = []
        """A sentence for each layer in which experts saw no calibration token."""
        self._calibrator = job.calibrator
        self._source = self._merged = None
        if job.calibrator is not None and job.token_ids is not None:
            self._source = job.calibrator.embed(job.token_ids)
            self._merged = self._source.copy() if job.recipe.compensated else None

    @torch.inference_mode()
    def layer(
        self, layer: int, tensors: MutableMapping[str, torch.Tensor], slots: LayerSlots | None
    ) -> LayerReport | None:
        """Replaces the expert matrices among a decoder layer's `tensors`, by name on disk, by packed ones.

        Returns:
            What merging changed, and what was expected of the mates; None for a dense layer, whose `slots` are None.

        Raises:
            CheckpointError: a tensor does not fit the model, or an element no word.
        """
        if self._calibrator is not None:
            self._calibrator.load(layer, tensors)
        if slots is None:
            self._run_dense()
            return None
        experts = layer_experts(self._job.shape, layer, tensors, self._job.activation, self._job.device)
        try:
            packed = self._merge(layer, experts, slots)
        except FormatError as error:
            raise CheckpointError(str(error)) from None
        names = layer_names(self._job.shape, layer)
        for expert_names in names:
            for name in expert_names:
                del tensors[name]
        prefix = self._job.shape.experts_prefix(layer)
        for slot, words in enumerate(packed.words):
            for projection, matrix in zip(self._job.shape.family.projections, words, strict=True):
                tensors[packed_name(prefix, slots.members(slot)[0], projection)] = matrix
        return LayerReport(slots, packed.statistics, packed.mates)

    def _run_dense(self) -> None:
        for hidden in (self._source, self._merged):
            if hidden is not None and self._calibrator is not None:
                self._calibrator.run(hidden)

    def _merge(self, layer: int, experts: ExpertWeights, slots: LayerSlots) -> PackedLayer:
        names = layer_names(self._job.shape, layer)
        if self._calibrator is None or self._source is None:
            return merge_layer(experts, names, slots, self._job.recipe)
        routed = self._calibrator.run(self._source)
        assert routed is not None
        self._note_idle(layer, routed)
        self._source.add(routed.through(experts))
        energy = self._source.energy()
        if self._merged is None:
            return merge_layer(experts, names, slots, self._job.recipe, routed, energy=energy)
        routed = self._calibrator.run(self._merged)
        assert routed is not None
        lacking = self._lacking(experts, routed)
        packed = merge_layer(experts, names, slots, self._job.recipe, routed, lacking, energy)
        self._merged.add(routed.through(packed.experts))
        return packed

    def _lacking(self, experts: ExpertWeights, routed: RoutedTokens) -> torch.Tensor:
        """What the layer's own experts leave between the two ways, float32 (num_tokens, hidden_size)."""
        assert self._source is not None
        assert self._merged is not None
        lacking = routed.through(experts).neg_()
        lacking += self._source.tokens
        lacking -= self._merged.tokens
        return lacking

    def _note_idle(self, layer: int, routed: RoutedTokens) -> None:
        idle = sorted(set(range(self._job.shape.num_experts)) - set(routed.topk_ids.unique().tolist()))
        if not idle:
            return
        consequence = "they are weighed as if they had seen one of the layer's; calibrate on more text"
        if self._job.recipe.rule == "paper":
            consequence = "every element that cannot be shared goes to their mates; calibrate on more text"
        self.idle_experts.append(f"layer {layer}: experts {idle} saw no calibration token, so {consequence}")
