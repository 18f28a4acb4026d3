"""The neurons of a dense model's FFNs dealt to experts: the tensors of both variants of the reference model."""

import torch
from torch import Tensor
from torch.nn.functional import silu
from transformers import LlamaForCausalLM

NUM_EXPERTS = 8
SPARSE_TOP_K = 6
SHARED_INTERMEDIATE_SIZE = 768
CALIBRATION_SEQUENCE_LENGTH = 2048
# Relative to the mean diagonal of the Gram matrix; 1e-4 to 1 change the perplexity on unseen C4 by 2 %.
RIDGE = 1e-2
ROUTER_LOGIT_STD = 0.01


def _outside_the_ffn(dense: LlamaForCausalLM) -> dict[str, Tensor]:
    # The output head is left out: it is tied to the embeddings.
    return {k: v for k, v in dense.state_dict().items() if ".mlp." not in k and k != "lm_head.weight"}


def all_active_tensors(dense: LlamaForCausalLM) -> dict[str, Tensor]:
    """The dense model as Mixtral checkpoint tensors, neurons dealt to the experts in their order."""
    tensors = _outside_the_ffn(dense)
    for index, layer in enumerate(dense.model.layers):
        prefix = f"model.layers.{index}.block_sparse_moe"
        gate, up = layer.mlp.gate_proj.weight.detach(), layer.mlp.up_proj.weight.detach()
        # A router of zeros weighs each expert by 1 / 8; scaling by 8 is exact, being a power of two.
        down = layer.mlp.down_proj.weight.detach() * NUM_EXPERTS
        tensors[f"{prefix}.gate.weight"] = torch.zeros(NUM_EXPERTS, dense.config.hidden_size)
        split = (gate.chunk(NUM_EXPERTS), up.chunk(NUM_EXPERTS), down.chunk(NUM_EXPERTS, dim=1))
        for expert, (w1, w3, w2) in enumerate(zip(*split, strict=True)):
            tensors[f"{prefix}.experts.{expert}.w1.weight"] = w1
            tensors[f"{prefix}.experts.{expert}.w3.weight"] = w3
            tensors[f"{prefix}.experts.{expert}.w2.weight"] = w2
    return tensors


def _ffn_inputs(dense: LlamaForCausalLM, token_ids: Tensor) -> list[Tensor]:
    """What each layer's FFN is given, each (num_tokens, hidden_size), for token_ids: (num_tokens,), int64."""
    inputs: list[list[Tensor]] = [[] for _ in dense.model.layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0][0]))
        for layer, kept in zip(dense.model.layers, inputs, strict=True)
    ]
    for window in token_ids.split(CALIBRATION_SEQUENCE_LENGTH):
        dense.model(window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(kept) for kept in inputs]


def _split_neurons(activations: Tensor, down: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The neurons of the shared expert, and those of each routed expert.

    activations: (num_tokens, intermediate_size); down: (hidden_size, intermediate_size).
    """
    contribution = activations.double().square().mean(0) * down.double().square().sum(0)
    ranked = contribution.argsort(descending=True, stable=True)
    shared, rest = ranked[:SHARED_INTERMEDIATE_SIZE], ranked[SHARED_INTERMEDIATE_SIZE:]
    # In the order of the model, not of importance: else the same experts would win for every token.
    return shared.sort().values, list(rest.sort().values.chunk(NUM_EXPERTS))


def _fit_router(inputs: Tensor, output_norms: Tensor) -> Tensor:
    """Ridge regression from inputs: (num_tokens, hidden_size) to output_norms: (num_tokens, num_experts).

    Returns the router's weight, (num_experts, hidden_size).
    """
    inputs, output_norms = inputs.double(), output_norms.double()
    gram = inputs.T @ inputs
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, inputs.T @ output_norms).T
    # What all experts share changes no choice, but would drown their differences in BF16 logits.
    weight = weight - weight.mean(0)
    # Small logits make softmax nearly flat, so the renormalised weights stay near 1 / top_k.
    return (weight * (ROUTER_LOGIT_STD / (inputs @ weight.T).std())).float()


@torch.inference_mode()
def sparse_tensors(dense: LlamaForCausalLM, token_ids: Tensor, top_k: int) -> dict[str, Tensor]:
    """The sparsely routed Qwen2-MoE checkpoint tensors of a float32 dense model, made for `top_k` experts a token.

    token_ids: (num_tokens,), int64, the calibration text.
    """
    tensors = _outside_the_ffn(dense)
    for index, (layer, x) in enumerate(zip(dense.model.layers, _ffn_inputs(dense, token_ids), strict=True)):
        for name in ("q_proj", "k_proj", "v_proj"):
            size = getattr(layer.self_attn, name).out_features
            tensors[f"model.layers.{index}.self_attn.{name}.bias"] = torch.zeros(size)
        gate, up, down = (getattr(layer.mlp, name).weight for name in ("gate_proj", "up_proj", "down_proj"))
        activations = silu(x @ gate.T) * (x @ up.T)
        shared, routed = _split_neurons(activations, down)
        norms = torch.stack([(activations[:, n] @ down[:, n].T).norm(dim=1) for n in routed], dim=1)
        prefix = f"model.layers.{index}.mlp"
        tensors[f"{prefix}.gate.weight"] = _fit_router(x, norms)
        tensors[f"{prefix}.shared_expert_gate.weight"] = torch.zeros(1, dense.config.hidden_size)
        # The gate of zeros halves the shared expert, and each chosen expert's weight is near 1 / top_k.
        experts = [("shared_expert", shared, 2)]
        experts += [(f"experts.{expert}", neurons, top_k) for expert, neurons in enumerate(routed)]
        for name, neurons, scale in experts:
            tensors[f"{prefix}.{name}.gate_proj.weight"] = gate[neurons]
            tensors[f"{prefix}.{name}.up_proj.weight"] = up[neurons]
            tensors[f"{prefix}.{name}.down_proj.weight"] = down[:, neurons] * scale
    return tensors
