"""What becomes of a running model when a reload of its weights ends in an error."""

import functools
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from .config import PuzzleMoEConfig
from .host import (
    LAYERWISE_INFO,
    VllmConfig,
    finalize_layerwise_reload,
    get_model_loader,
    initialize_layerwise_reload,
    logger,
)
from .reload import PackedParameter, file_stamps

_Source = tuple[str, str | None, str]


class Recovery:
    """Of one model in this process; its layers with packed experts share it.

    vLLM copies into the running tensors layer by layer, and has no hook for an error of its own that ends a reload; so
    `load_weights` is wrapped, of this model alone. What has been copied is gone. It comes back from the checkpoint that
    it was loaded from where that is a folder which has not changed since; otherwise the model's experts are taken away,
    so that no call computes with weights of two checkpoints.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        self._model_config = vllm_config.model_config
        self._load_config = vllm_config.load_config
        # Other ranks may have loaded what fails on this one, and all have to compute with the same weights.
        self._is_alone = vllm_config.parallel_config.world_size_across_dp == 1
        self._source = self._read_source()
        self._loaded_from = self._files_on_disk() if vllm_config.load_config.load_format != "dummy" else None
        self._taken: weakref.ref[torch.nn.Module] | None = None
        self._is_taking = False

    @classmethod
    def of(cls, config: PuzzleMoEConfig, vllm_config: VllmConfig) -> "Recovery":
        """The one of the model with this config."""
        if config not in _RECOVERIES:
            _RECOVERIES[config] = cls(vllm_config)
        return _RECOVERIES[config]

    def begin(self, layer: torch.nn.Module, check: Callable[[], None]) -> None:
        """Begins a reload, unless `check` raises; then the model runs on as it did."""
        if self._is_taking:
            return
        try:
            check()
        except Exception:
            self._put_back()
            if self._taken is not None:
                self.take_away(layer)
            raise
        self._watch(layer)

    def take_away(self, layer: torch.nn.Module) -> None:
        """Ends a reload that left weights of two checkpoints: this layer has no tensors until another brings them."""
        self._put_back()
        self._taken = weakref.ref(layer)
        self._is_taking = True
        initialize_layerwise_reload(layer)
        self._is_taking = False

    def end_round(self, layer: torch.nn.Module) -> None:
        """Makes the next reload of a layer begin as the first one did."""
        _unwrap(layer)
        if self._taken is not None and self._taken() is layer:
            self._taken = None

    def _watch(self, layer: torch.nn.Module) -> None:
        # The whole model is the first of those around the layer.
        model: Any = next(
            module
            for module in LAYERWISE_INFO
            if hasattr(module, "load_weights") and any(part is layer for part in module.modules())
        )
        if "load_weights" in vars(model):
            return
        load = model.load_weights

        @functools.wraps(load)
        def load_weights(weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any) -> Any:
            try:
                loaded = load(weights, *args, **kwargs)
            except Exception:
                self._recover(model, layer, load)
                raise
            self._source = self._read_source()
            # Those of a trainer cannot be read again.
            from_disk = getattr(weights, "__name__", None) == "get_all_weights"
            self._loaded_from = self._files_on_disk() if from_disk else None
            return loaded

        model.load_weights = load_weights

    def _recover(self, model: torch.nn.Module, layer: torch.nn.Module, load: Callable[[Any], Any]) -> None:
        untouched = self._taken is None and all(LAYERWISE_INFO[part].can_load() for part in model.modules())
        self._put_back()
        if self._is_alone and untouched:
            return
        if self._is_alone and self._loaded_from and self._loaded_from == self._files_on_disk():
            logger.warning("Reloading failed halfway; the weights of %s are loaded again.", self._model_config.model)
            try:
                initialize_layerwise_reload(model)
                load(get_model_loader(self._load_config).get_all_weights(self._model_config, model))
                finalize_layerwise_reload(model, self._model_config)
            except Exception as error:
                logger.error("The weights of %s could not be loaded again: %s", self._model_config.model, error)
            else:
                return
        self.take_away(layer)

    def _put_back(self) -> None:
        """Ends a reload: what waits for weights gets back the tensors it ran with, and vLLM's config its checkpoint.

        vLLM has put the name of the new one there, and a reload that names none would take it again.
        """
        put_running_weights_back(self._model_config)
        self._model_config.model, self._model_config.revision, self._model_config.model_weights = self._source

    def _read_source(self) -> _Source:
        return self._model_config.model, self._model_config.revision, self._model_config.model_weights

    def _files_on_disk(self) -> tuple[_Source, tuple[Any, ...]] | None:
        source = self._read_source()
        stamps = file_stamps(Path(source[0]))
        return (source, stamps) if stamps else None


_RECOVERIES: weakref.WeakKeyDictionary[PuzzleMoEConfig, Recovery] = weakref.WeakKeyDictionary()


def put_running_weights_back(model_config: Any) -> None:
    """Every layer that still waits for weights gets back the tensors that it ran with."""
    waiting = [(layer, info) for layer, info in LAYERWISE_INFO.items() if info.can_load()]
    for layer, info in waiting:
        _unwrap(layer)
        info.loaded_weights.clear()
        # Nothing has come and nothing is expected, which to vLLM means: as it was.
        info.load_numel = info.load_numel_total = 0
    finalize_layerwise_reload(torch.nn.ModuleList(layer for layer, _ in waiting), model_config)


def _unwrap(layer: torch.nn.Module) -> None:
    parameters, _ = LAYERWISE_INFO[layer].restore_metadata
    for parameter in parameters.values():
        if isinstance(parameter, PackedParameter):
            parameter.unwrap()
