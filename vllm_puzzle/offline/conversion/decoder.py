"""The decoder inside transformers' own model: the part whose layers a text goes through."""

from typing import Any

import torch
from torch import nn

from vllm_puzzle.model_tensors import hub_names

from ..errors import CheckpointError, reason_of
from .stand_ins import dispatches

_MEND = "convert without --calibration"


class Decoder:
    """A model's decoder, found whatever is around it.

    `module` is transformers' own, with `layers`, on the meta device but for its rotary frequencies: they are computed,
    not loaded, so they need memory. `embedding` is the name of its embedding on the hub.
    """

    def __init__(self, model: Any, where: object, device: torch.device) -> None:
        """
        Args:
            model: see `build_model`; it is changed.
            where: the path of its config, for error messages.

        Raises:
            CheckpointError: transformers cannot build the rotary embeddings, or the model has no such decoder.
        """
        module = model.eval().get_decoder()
        # Of Llama 4 it is the causal model.
        self.module: Any = module if hasattr(module, "layers") else getattr(module, "model", None)
        if not hasattr(self.module, "layers"):
            raise CheckpointError(f"transformers' own model of {where} has no decoder with layers; {_MEND}")
        self._where = where
        self._hub_names = hub_names(model)
        self._beginning = next(name for name, part in model.named_modules() if part is self.module)
        self.embedding = self._find_embedding()
        self._build_buffers(device)

    def layer_names(self, layer: int) -> dict[str, str]:
        """The name on the hub of every tensor of a layer outside its routed experts, by its name in the module.

        A tensor that is stored in another form has the name that it has in the model.
        """
        prefix = f"{self._beginning}.layers.{layer}."
        experts = self.experts_name(layer)
        names = self.module.layers[layer].state_dict()
        return {
            name: self._hub_names.get(prefix + name, prefix + name)
            for name in names
            if experts is None or not name.startswith(f"{experts}.")
        }

    def experts_name(self, layer: int) -> str | None:
        """The name of the routed experts in a layer's module, None where it has none."""
        names = [
            name
            for name, module in self.module.layers[layer].named_modules()
            if dispatches(module) or name.endswith(".experts") or name == "experts"
        ]
        return names[0] if names else None

    def _find_embedding(self) -> str:
        embedding = self.module.get_input_embeddings()
        if type(embedding) is not nn.Embedding:
            raise CheckpointError(
                f"transformers' own model of {self._where} embeds tokens by {type(embedding).__name__}, not by rows "
                f"alone; {_MEND}"
            )
        name = next(name for name, part in self.module.named_modules() if part is embedding)
        return self._hub_names[f"{self._beginning}.{name}.weight"]

    def _build_buffers(self, device: torch.device) -> None:
        for name, part in list(self.module.named_modules()):
            if not part._non_persistent_buffers_set or name.startswith("layers."):
                continue
            try:
                built = type(part)(self.module.config).to(device)
            except Exception as error:
                raise CheckpointError(
                    f"transformers cannot build the model that {self._where} describes: {reason_of(error)}; correct it"
                ) from None
            self.module.set_submodule(name, built)
