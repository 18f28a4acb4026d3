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

from ..format import FormatError, LayerCodes, LayerSlots, PuzzleMoEQuantizationConfig
from .config import PuzzleMoEConfig
from .host import get_hf_file_to_dict


class PackedParameter(torch.nn.Parameter):
    """Words, codes, codebooks or scales, with their loader; `begin_reload` is called when vLLM loads them again.

    vLLM then sets a loader of its own, which wraps this one, on the parameter's copy on the meta device; until it has
    done so for every layer it copies nothing, so `begin_reload` may still refuse.
    """

    def __new__(cls, data: torch.Tensor, *_: Any) -> "PackedParameter":
        return super().__new__(cls, data, requires_grad=False)

    def __init__(
        self,
        data: torch.Tensor,
        weight_loader: Callable[..., Any],
        loaded_numel: int,
        begin_reload: Callable[[], None],
    ) -> None:
        """`loaded_numel` is how many elements come from the checkpoint; the rest is padding."""
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


def check_checkpoint(model_config: Any, running: PuzzleMoEConfig, required: bool) -> None:
    """Whether the checkpoint that a vLLM ModelConfig names can be loaded into the running model.

    Without `required` a checkpoint whose config.json cannot be had passes: its weights may come from elsewhere.

    Raises:
        FormatError: it is another model's, packed otherwise, or lacks a tensor that the running model has.
    """
    model = model_config.model
    found = _check_folder(model, model_config.revision, running, _architectures(model_config), file_stamps(Path(model)))
    if required and not found:
        raise FormatError(
            f"{model} cannot be reloaded: there is no config.json to say how its experts are packed; give the "
            f"folder of a packed checkpoint"
        )


def file_stamps(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Tells the files of a folder from those that are put in their place later."""
    try:
        with os.scandir(folder) as entries:
            stats = [(entry.name, entry.stat()) for entry in entries if entry.name.endswith((".json", ".safetensors"))]
    except OSError:
        return ()
    return tuple(sorted((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats))


def _architectures(model_config: Any) -> tuple[str, ...] | None:
    """The running model's architectures; None where --hf-overrides may have replaced those of config.json."""
    overrides = model_config.hf_overrides
    if callable(overrides) or "architectures" in overrides:
        return None
    return tuple(model_config.hf_config.architectures or ())


# Every layer asks, of the same checkpoint. A refusal is not kept: it ends the reload.
@lru_cache(maxsize=1)
def _check_folder(
    model: str,
    revision: str | None,
    running: PuzzleMoEConfig,
    architectures: tuple[str, ...] | None,
    stamps: tuple[Any, ...],
) -> bool:
    """Whether there is a config.json; raises FormatError as `check_checkpoint`."""
    try:
        config = get_hf_file_to_dict("config.json", model, revision)
    except HFValidationError:
        # Neither a folder nor a name that a repository could have.
        config = None
    if config is None:
        return False
    section = config.get("quantization_config")
    if section is None:
        raise FormatError(
            f"{model}/config.json has no quantization_config, so its experts are not packed and cannot be reloaded "
            f"into a model whose experts are; start the server again with it"
        )
    there = tuple(config.get("architectures") or ())
    if architectures and there and there != architectures:
        raise FormatError(
            f"{model} cannot be reloaded into the running model, which is another one: its architecture is "
            f"{', '.join(there)} there and {', '.join(architectures)} in the running model; start the server again "
            f"with it"
        )
    difference = _difference(PuzzleMoEConfig.from_config(section).quantization, running.quantization)
    if difference is not None:
        raise FormatError(
            f"{model} cannot be reloaded into the running model, whose experts are packed otherwise: {difference}; "
            f"start the server again with it"
        )
    running.check_tensors(model, revision)
    return True


def _difference(found: PuzzleMoEQuantizationConfig, running: PuzzleMoEQuantizationConfig) -> str | None:
    """The first thing in which they store experts differently, in words."""
    for field in ("bits", "num_experts", "hidden_size", "intermediate_size"):
        there, here = getattr(found, field), getattr(running, field)
        if there != here:
            return f"{field} is {there} there and {here} in the running model"
    for what, layers in (
        ("packed pairs", lambda config: [layer.layer for layer in config.layers]),
        ("codes", lambda config: [layer.layer for layer in config.coded_layers]),
        ("plain experts", lambda config: config.plain_layers),
    ):
        there, here = layers(found), layers(running)
        if there != here:
            return f"layers {there} have {what} there and layers {here} in the running model"
    differences = (
        *(_other_slots(new, old) for new, old in zip(found.layers, running.layers, strict=True)),
        *(_other_widths(new, old) for new, old in zip(found.coded_layers, running.coded_layers, strict=True)),
    )
    return next((difference for difference in differences if difference is not None), None)


def _other_slots(new: LayerSlots, old: LayerSlots) -> str | None:
    if new.pairs != old.pairs:
        return (
            f"layer {new.layer} has {new.pairs} pairs of {new.num_experts} experts there and {old.pairs} of "
            f"{old.num_experts} in the running model"
        )
    for slot in range(new.num_slots):
        there, here = new.members(slot), old.members(slot)
        if there != here:
            return (
                f"slot {slot} of layer {new.layer} holds {_experts(there)} there and {_experts(here)} in the running "
                f"model"
            )
    return None


def _other_widths(new: LayerCodes, old: LayerCodes) -> str | None:
    for expert in range(new.num_experts):
        there, here = ((each.w13_bits[expert], each.w2_bits[expert]) for each in (new, old))
        if there != here:
            return (
                f"the codes of expert {expert} of layer {new.layer} have {there[0]} and {there[1]} bits there and "
                f"{here[0]} and {here[1]} in the running model"
            )
    return None


def _experts(members: tuple[int, ...]) -> str:
    return f"expert{'s' if len(members) > 1 else ''} {' and '.join(map(str, members))}"
