"""The calibration tokens' way through a model whose layers are merged one after the other."""

from collections.abc import Mapping

import torch

from ..checkpoints.expert_tensors import StoredExperts
from ..merging.layer import ExpertWeights, RoutedTokens
from .job import Job
from .units import LayerTokens


class CalibrationPass:
    """Knows of each layer, in their order, what its experts see.

    With a sequential rule the tokens take two ways at once: through the source model, and through the merged
    layers, so that each layer can make up for those before it. With the other rules the first is enough.
    """

    def __init__(self, job: Job) -> None:
        assert job.calibrator is not None
        assert job.token_ids is not None
        self._job = job
        self._calibrator = job.calibrator
        self.idle_experts: list[str] = []
        """A sentence for each layer in which experts saw no calibration token."""
        self._source = job.calibrator.embed(job.token_ids)
        self._merged = self._source.copy() if job.recipe.rule.sequential else None

    @property
    def states(self) -> dict[str, torch.Tensor]:
        """The hidden states as they are now, for `restore`."""
        states = {"source": self._source.states}
        if self._merged is not None:
            states["merged"] = self._merged.states
        return states

    @torch.inference_mode()
    def restore(self, states: Mapping[str, torch.Tensor]) -> None:
        """Goes on from what `states` was after some layer."""
        self._source.states.copy_(states["source"])
        if self._merged is not None:
            self._merged.states.copy_(states["merged"])

    @torch.inference_mode()
    def enter(self, layer: int) -> LayerTokens | None:
        """Carries the tokens through a decoder layer, of which one expert after the other is read.

        Returns:
            What its routed experts see; None for a dense layer. With a sequential rule the layer is to be left
            by `leave`.

        Raises:
            CheckpointError: a tensor cannot be read or does not fit the model, or what comes out is not finite.
        """
        job = self._job
        self._calibrator.load(layer, job.checkpoint.read(job.names_beside_experts(layer)))
        routed = self._calibrator.run(self._source)
        if routed is None:
            if self._merged is not None:
                self._calibrator.run(self._merged)
            return None
        self._note_idle(layer, routed)
        experts = StoredExperts(job.checkpoint, job.shape, layer, job.activation, job.device)
        self._source.add(routed.through(experts))
        self._source.check_finite(layer)
        energy = self._source.energy()
        if self._merged is None:
            return LayerTokens(routed, energy)
        routed = self._calibrator.run(self._merged)
        assert routed is not None
        # What the layer's own experts leave between the two ways.
        lacking = routed.through(experts).neg_()
        lacking += self._source.tokens
        lacking -= self._merged.tokens
        return LayerTokens(routed, energy, lacking)

    @torch.inference_mode()
    def leave(self, layer: int, tokens: LayerTokens, merged: ExpertWeights) -> None:
        """Goes on from what the merged experts of layer `layer`, just entered, answer."""
        if self._merged is not None:
            self._merged.add(tokens.routed.through(merged))
            self._merged.check_finite(layer)

    def _note_idle(self, layer: int, routed: RoutedTokens) -> None:
        idle = sorted(set(range(self._job.shape.num_experts)) - set(routed.topk_ids.unique().tolist()))
        if not idle:
            return
        self.idle_experts.append(
            f"layer {layer}: experts {idle} saw no calibration token, so {self._job.recipe.rule.idle_consequence}; "
            f"calibrate on more text"
        )
