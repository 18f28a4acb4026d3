"""What a model or its configuration may ask of the experts and ours do not have: refused, by name."""

from collections.abc import Mapping

import torch

from ..format import ACTIVATIONS
from ..kernels import Engine
from .host import RoutedExperts, VllmConfig, current_platform

# They copy into the parameters what a running engine's parameters held, past the weight loaders.
_LOAD_FORMATS_OF_ENGINES = ("sharded_state", "runai_streamer_sharded", "tensorizer", "ipc_cache", "modelexpress")
_ATTENTION = "q_proj k_proj v_proj o_proj"

Unsupported = Mapping[str, bool]
"""What is not supported, with what to do instead, and whether it is asked for."""


def refuse_unsupported(layer: RoutedExperts, engine: Engine, vllm_config: VllmConfig, of_its_kind: Unsupported) -> None:
    """Raises NotImplementedError for the first thing that is not supported, with the layer and what to do instead.

    `of_its_kind` is what experts that are stored as the layer's do not have; the rest goes for all.
    """
    moe = layer.moe_config
    parallel = moe.moe_parallel_config
    activation = layer.activation.value
    eager = vllm_config.model_config is None or vllm_config.model_config.enforce_eager
    load_format = vllm_config.load_config.load_format
    # Without a modular kernel of the experts' own, vLLM sends tokens to other ranks by the manager of the backend, and
    # only this one's can (vllm/model_executor/layers/fused_moe/runner/moe_runner.py, `_maybe_dispatch`).
    dispatches = parallel.dp_size > 1 or parallel.is_sequence_parallel
    backend = parallel.all2all_backend
    refusals = {
        f"activation {activation} (supported: {', '.join(ACTIVATIONS)})": activation not in ACTIVATIONS,
        "biases in the experts": moe.has_bias,
        "a SwiGLU limit, alpha or beta": any(
            value is not None for value in (layer.swiglu_limit, layer.swiglu_alpha, layer.swiglu_beta)
        ),
        **of_its_kind,
        f"--all2all-backend {backend} with data or sequence parallelism (use allgather_reducescatter)": dispatches
        and backend != "allgather_reducescatter",
        "expert parallelism over prefill context parallel ranks (leave out --enable-expert-parallel)": parallel.use_ep
        and parallel.pcp_size > 1,
        f"--load-format {load_format} (use auto, or runai_streamer, with the packed checkpoint)": load_format
        in _LOAD_FORMATS_OF_ENGINES,
        "shared experts fused into the routed ones": layer.expert_map_manager.num_fused_shared_experts > 0,
        f"graph capture on a GPU with the {engine.name} engine (add --enforce-eager)": not engine.can_be_captured
        and not current_platform.is_cpu()
        and not eager,
    }
    if moe.is_lora_enabled:
        refusals |= _lora_refusals(vllm_config.lora_config.target_modules)
    for feature, found in refusals.items():
        if found:
            raise NotImplementedError(f"{layer.layer_name}: puzzlemoe does not support {feature}")


def refuse_unsupported_plain(layer: RoutedExperts) -> None:
    """Raises NotImplementedError where vLLM's own experts would not compute what a plain layer is."""
    # Its kernels there are not told which experts a rank has, and read past the weights that it holds
    # (vllm/model_executor/layers/fused_moe/experts/cpu_moe.py, `CPUUnquantizedExperts.apply`).
    if current_platform.is_cpu() and layer.use_ep:
        raise NotImplementedError(
            f"{layer.layer_name}: vLLM does not support expert parallelism of plain experts on a CPU; leave out "
            f"--enable-expert-parallel, or convert every layer"
        )
    # It takes its Triton kernels then, whether or not an adapter is to change the experts.
    if current_platform.is_cpu() and layer.moe_config.is_lora_enabled:
        raise NotImplementedError(
            f"{layer.layer_name}: vLLM does not support LoRA beside plain experts on a CPU; leave out --enable-lora, "
            f"or convert every layer"
        )


def names_experts(module: str) -> bool:
    """Whether a module's name, whole or its end, is that of routed experts or lies inside them."""
    return "experts" in module.split(".")


def refuse_to_save(layer: RoutedExperts) -> None:
    """Makes `state_dict` of the whole model raise NotImplementedError: what it saved could not be loaded again."""

    def refuse(_: torch.nn.Module, prefix: str, keep_vars: bool) -> None:
        # The prefix of a part's own state_dict is shorter: vLLM runs a layer from it where its weights are offloaded.
        if prefix.startswith(layer_name):
            raise NotImplementedError(
                f"{layer_name}: puzzlemoe does not support saving the weights of a running engine "
                f"(save_sharded_state), where experts lie in the engine's order; copy the packed checkpoint itself"
            )

    layer_name = layer.layer_name
    layer.register_state_dict_pre_hook(refuse)


def _lora_refusals(target_modules: list[str] | None) -> dict[str, bool]:
    experts = [] if target_modules is None else [module for module in target_modules if names_experts(module)]
    return {
        f"LoRA on the routed experts, which --enable-lora alone asks for (add --lora-target-modules {_ATTENTION}, or "
        f"others that are not experts)": target_modules is None,
        f"LoRA on the routed experts (leave {', '.join(experts)} out of --lora-target-modules)": bool(experts),
    }
