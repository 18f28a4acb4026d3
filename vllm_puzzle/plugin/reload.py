"""Reloading weights into a running model: vLLM's `reload_weights`, and weight transfer, which goes the same way.

vLLM puts every layer on the meta device, calls each weight loader once there to count what it would copy, and again
with memory where a layer is complete. It copies into the running tensors layer by layer and takes nothing back when an
error ends it (vllm/model_executor/model_loader/reload/layerwise.py).
"""

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError

from ..format import FormatError, PuzzleMoEQuantizationConfig
from .config import PuzzleMoEConfig
from .host import LAYERWISE_INFO, finalize_layerwise_reload, get_hf_file_to_dict, initialize_layerwise_reload


class PackedParameter(torch.nn.Parameter):
    """Words, with the loader that copies them; `begin_reload` is called when vLLM begins to load them again.

    vLLM then sets a loader of its own, which wraps this one, on the parameter's copy on the meta device; until it has
    done so for every layer it copies nothing, so `begin_reload` may still refuse.
    """

    def __new__(cls, words: torch.Tensor, *_: Any) -> "PackedParameter":
        return super().__new__(cls, words, requires_grad=False)

    def __init__(
        self,
        words: torch.Tensor,
        weight_loader: Callable[..., Any],
        loaded_numel: int,
        begin_reload: Callable[[], None],
    ) -> None:
        """`loaded_numel` is how many of the words come from the checkpoint; the rest is padding."""
        self._own_loader = self._weight_loader = weight_loader
        self._begin_reload = begin_reload
        # By this name vLLM asks for it, to know when a layer is complete.
        self.weight_loader_numel = loaded_numel

    @property
    def weight_loader(self) -> Callable[..., Any]:
        return self._weight_loader

    @weight_loader.setter
    def weight_loader(self, loader: Callable[..., Any]) -> None:
        if self.is_meta:
            self._begin_reload()
        self._weight_loader = loader

    def unwrap(self) -> None:
        """Takes vLLM's loader off: vLLM keeps the copies on the meta device, and would not set one the next time."""
        self._weight_loader = self._own_loader


def check_same_slots(model: str, revision: str | None, running: PuzzleMoEQuantizationConfig, required: bool) -> None:
    """Whether a checkpoint's experts are packed as those of the running model; raises FormatError where they are not.

    Without `required` a checkpoint whose config.json cannot be had passes: its weights may come from elsewhere.
    """
    stamps = tuple(_stamp(Path(model) / name) for name in ("config.json", "model.safetensors.index.json"))
    found = _read_checked(model, revision, stamps)
    if found is None:
        if required:
            raise FormatError(
                f"{model} cannot be reloaded: there is no config.json to say how its experts are packed; give the "
                f"folder of a packed checkpoint"
            )
        return
    difference = _difference(found, running)
    if difference is not None:
        raise FormatError(
            f"{model} cannot be reloaded into the running model, whose experts are packed otherwise: {difference}; "
            f"start the server again with it"
        )


def put_running_weights_back(model_config: Any) -> None:
    """Ends a reload that has failed: every layer that still waits for weights gets back the tensors it ran with."""
    waiting = [(layer, info) for layer, info in LAYERWISE_INFO.items() if info.can_load()]
    for layer, info in waiting:
        end_round(layer)
        info.loaded_weights.clear()
        # Nothing has come and nothing is expected, which to vLLM means: as it was.
        info.load_numel = info.load_numel_total = 0
    finalize_layerwise_reload(torch.nn.ModuleList(layer for layer, _ in waiting), model_config)


def end_round(layer: torch.nn.Module) -> None:
    """Makes the next reload of a layer begin as the first one did."""
    parameters, _ = LAYERWISE_INFO[layer].restore_metadata
    for parameter in parameters.values():
        if isinstance(parameter, PackedParameter):
            parameter.unwrap()


def wait_for_weights(layer: torch.nn.Module) -> None:
    """Takes a layer's tensors away until a reload brings them: no call computes with words of two checkpoints."""
    initialize_layerwise_reload(layer)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


# Every layer asks, of the same checkpoint; the stamps are there to tell a folder that was replaced.
@lru_cache(maxsize=1)
def _read_checked(model: str, revision: str | None, stamps: tuple[Any, ...]) -> PuzzleMoEQuantizationConfig | None:
    try:
        config = get_hf_file_to_dict("config.json", model, revision)
    except HFValidationError:
        # Neither a folder nor a name that a repository could have.
        config = None
    if config is None:
        return None
    section = config.get("quantization_config")
    if section is None:
        raise FormatError(
            f"{model}/config.json has no quantization_config, so its experts are not packed and cannot be reloaded "
            f"into a model whose experts are; start the server again with it"
        )
    found = PuzzleMoEConfig.from_config(section)
    found.maybe_update_config(model)
    return found.quantization


def _difference(found: PuzzleMoEQuantizationConfig, running: PuzzleMoEQuantizationConfig) -> str | None:
    """The first thing in which the slots differ, in words."""
    for field in ("bits", "hidden_size", "intermediate_size"):
        there, here = getattr(found, field), getattr(running, field)
        if there != here:
            return f"{field} is {there} there and {here} in the running model"
    packed, runs = ([layer.layer for layer in config.layers] for config in (found, running))
    if packed != runs:
        return f"layers {packed} are packed there and {runs} in the running model"
    for new, old in zip(found.layers, running.layers, strict=True):
        if (new.num_experts, new.pairs) != (old.num_experts, old.pairs):
            return (
                f"layer {new.layer} has {new.pairs} pairs of {new.num_experts} experts there and {old.pairs} of "
                f"{old.num_experts} in the running model"
            )
        for slot in range(new.num_slots):
            there, here = new.members(slot), old.members(slot)
            if there != here:
                return (
                    f"slot {slot} of layer {new.layer} holds {_experts(there)} there and {_experts(here)} in the "
                    f"running model"
                )
    return None


def _experts(members: tuple[int, ...]) -> str:
    return f"expert{'s' if len(members) > 1 else ''} {' and '.join(map(str, members))}"
