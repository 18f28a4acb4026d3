"""The path of the calibration tokens through the decoder layers, one layer after the other."""

from collections.abc import Callable, Iterator, Mapping

import torch

from ..merging.layer import Experts, ExpertWeights, LayerTokens
from .calibration import Calibrator
from .job import Setup


class CalibrationWalk:
    """Carries the calibration tokens through the source model, and tells of each MoE layer what its experts see.

    With `through_merged` the tokens take two paths at once, through the source's layers and through the merged ones, so
    that each layer can make up for those merged before it.
    """

    def __init__(self, calibrator: Calibrator, through_merged: bool = False) -> None:
        """
        Raises:
            CheckpointError: an embedding is not finite, or transformers' model fails.
        """
        self._calibrator = calibrator
        self._source = calibrator.embed()
        self._merged = self._source.copy() if through_merged else None

    @property
    def states(self) -> dict[str, torch.Tensor]:
        """The `HiddenStates.states` between two layers, by the path that they are on."""
        states = {"source": self._source.states}
        if self._merged is not None:
            states["merged"] = self._merged.states
        return states

    @torch.inference_mode()
    def restore(self, states: Mapping[str, torch.Tensor]) -> None:
        """Puts the tokens where they were when `states` were read."""
        self._source.states.copy_(states["source"])
        if self._merged is not None:
            self._merged.states.copy_(states["merged"])

    @torch.inference_mode()
    def enter(self, layer: int, experts: Experts | None) -> LayerTokens | None:
        """Carries the tokens through a decoder layer of the source, and of the merged model up to its experts.

        Args:
            experts: the source's, None for a dense layer.

        Returns:
            What the layer's experts see, None for a dense layer. With `through_merged` an MoE layer is to be left with
            `leave`.

        Raises:
            CheckpointError: a tensor cannot be read or does not fit the model, or what comes out is not finite.
        """
        routed = self._calibrator.run(layer, self._source)
        if experts is None or routed is None:
            if self._merged is not None:
                self._calibrator.run(layer, self._merged)
            return None
        idle = tuple(sorted(set(range(experts.num_experts)) - set(routed.topk_ids.unique().tolist())))
        self._source.add(routed.through(experts))
        self._source.check_finite(layer)
        energy = self._source.energy()
        if self._merged is None:
            return LayerTokens(routed, energy, idle_experts=idle)
        routed = self._calibrator.run(layer, self._merged)
        assert routed is not None
        # What the layer's own experts leave between the two paths.
        lacking = routed.through(experts).neg_()
        lacking += self._source.tokens
        lacking -= self._merged.tokens
        return LayerTokens(routed, energy, lacking, idle)

    @torch.inference_mode()
    def leave(self, layer: int, tokens: LayerTokens, merged: ExpertWeights) -> None:
        """Carries the tokens of the merged model through the merged experts of `layer`, which was just entered.

        Raises:
            CheckpointError: what comes out is not finite.
        """
        assert self._merged is not None
        self._merged.add(tokens.routed.through(merged))
        self._merged.check_finite(layer)


def survey_layers(
    setup: Setup, advance: Callable[[int], None]
) -> Iterator[tuple[int, ExpertWeights, LayerTokens | None]]:
    """Every MoE layer of the source with its experts and what they see, before anything is converted.

    Runs the calibration tokens through the source model; without a text there are none.

    Args:
        advance: told of each decoder layer that is done.

    Raises:
        CheckpointError: a layer does not fit transformers' own model, or has an element that cannot be stored.
    """
    walk = None if setup.calibrator is None else CalibrationWalk(setup.calibrator)
    for layer in setup.decoder_layers:
        experts = setup.read_experts(layer)
        tokens = None if walk is None else walk.enter(layer, experts)
        if experts is not None:
            yield layer, experts, tokens
        advance(layer)
