"""LoRA adapters beside packed experts: on attention and other layers, never on the experts."""

from typing import Any

from ..format import FormatError
from .host import LoRAModel
from .refusals import names_experts

_load_adapter = LoRAModel.from_local_checkpoint


def refuse_expert_adapters() -> None:
    """Makes this process refuse every adapter that has weights for experts.

    vLLM leaves out what an adapter has for modules outside of --lora-target-modules, without a word, and has no hook
    where adapters are loaded; so its method is replaced, in processes alone that serve packed experts with LoRA.
    """
    LoRAModel.from_local_checkpoint = staticmethod(_load_adapter_without_experts)


def _load_adapter_without_experts(lora_dir: str, *args: Any, **kwargs: Any) -> LoRAModel:
    """vLLM's `LoRAModel.from_local_checkpoint`, which raises FormatError for an adapter that names experts."""
    adapter = _load_adapter(lora_dir, *args, **kwargs)
    experts = sorted(name for name in adapter.loras if names_experts(name))
    if experts:
        named = f"{', '.join(experts[:3])}{', ...' if len(experts) > 3 else ''}"
        raise FormatError(
            f"the LoRA adapter {lora_dir} has weights for {len(experts)} modules of the routed experts, which "
            f"puzzlemoe does not support: {named}; train it without them"
        )
    return adapter
