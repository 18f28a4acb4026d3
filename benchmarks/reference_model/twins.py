"""Twins of a checkpoint: the same function on other weights, and the same weights used unevenly.

The dense model's weights lie on a 4-bit grid, which flatters 4-bit integers; a rotated twin's do not. Its experts are
used alike, which large mixtures' are not; a skewed twin's are not either.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SEED = 0
# How unevenly a skewed twin's experts are used: the standard deviation of the logarithm of their tokens.
SKEW = 1.0
# A skewed twin's choices: with more, an expert that every token chooses would not be used enough more than the mean.
SKEWED_TOP_K = 2
_BALANCING_STEPS = 400
# Relative to the mean diagonal of the Gram matrix.
_RIDGE = 1e-3

_EMBEDDING, _HEAD, _FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_NORMS = {"input_layernorm": r"self_attn\.[qkv]_proj", "post_attention_layernorm": r"(mlp|block_sparse_moe)\..*"}
# What writes to the residual stream; every other matrix of a layer reads from it.
_WRITERS = re.compile(r"\.(o_proj|down_proj|w2)\.weight$")


def rotated(tensors: Mapping[str, Tensor], seed: int = SEED) -> dict[str, Tensor]:
    """The tensors of a Llama-like checkpoint, dense or MoE, in which the residual stream is rotated at random.

    The norms' weights go into the matrices that read what is normed, which makes the norms commute with a rotation;
    neighbouring matrices absorb that. The output head, tied to the embeddings before, has a tensor of its own then.
    The model computes what it did, up to rounding.

    Args:
        tensors: floating, by their names on disk.

    Returns:
        Tensors of the same dtypes and shapes, and `lm_head.weight`.
    """
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    wide[_HEAD] = wide.get(_HEAD, wide[_EMBEDDING]) * wide[_FINAL_NORM]
    for name in [name for name in wide if name.removesuffix(".weight").endswith(tuple(_NORMS))]:
        prefix, norm = name.removesuffix(".weight").rsplit(".", 1)
        readers = re.compile(rf"{re.escape(prefix)}\.{_NORMS[norm]}\.weight")
        for reader in filter(readers.fullmatch, list(wide)):
            if not _WRITERS.search(reader):
                wide[reader] = wide[reader] * wide[name]
        wide[name] = torch.ones_like(wide[name])
    wide[_FINAL_NORM] = torch.ones_like(wide[_FINAL_NORM])
    rotation = _rotation(wide[_EMBEDDING].shape[1], seed)
    result = {}
    for name, tensor in wide.items():
        if tensor.ndim == 2:
            tensor = rotation.T @ tensor if _WRITERS.search(name) else tensor @ rotation
        result[name] = tensor.to(tensors.get(name, tensors[_EMBEDDING]).dtype).contiguous()
    return result


def _rotation(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix, float64 (size, size)."""
    normal = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    orthogonal, triangle = torch.linalg.qr(normal)
    # Uniform over all rotations and reflections.
    return orthogonal * triangle.diagonal().sign()


@torch.inference_mode()
def skew_routers(model: Any, token_ids: Tensor, seed: int = SEED) -> None:
    """Biases every router of a float32 MoE model until its experts' tokens spread like a log-normal of sigma SKEW.

    A router has no bias, so it gets one by a direction that all tokens have in common, layer by layer. Which expert
    is used how much is drawn.

    Args:
        model: transformers' model with routers `layers[].mlp.gate`; their weights are changed in place.
        token_ids: int64 (num_sequences, sequence_length), on which the tokens are counted.
    """
    generator = torch.Generator().manual_seed(seed)

    def skew(router: Any, arguments: tuple[Tensor, ...]) -> None:
        hidden = arguments[0].flatten(0, -2)
        num_experts = len(router.weight)
        places = torch.randperm(num_experts, generator=generator)
        quantiles = torch.special.ndtri((places + 0.5) / num_experts)
        shares = (SKEW * quantiles).exp()
        wanted = (shares / shares.sum() * router.top_k).clamp(max=0.98)
        common = _common(hidden)
        biases = _biases(hidden @ router.weight.T, hidden @ common, wanted, router.top_k)
        router.weight += biases[:, None] * common

    hooks = [layer.mlp.gate.register_forward_pre_hook(skew) for layer in model.model.layers]
    model.model(token_ids, use_cache=False)
    for hook in hooks:
        hook.remove()


def _common(hidden: Tensor) -> Tensor:
    """The direction, (hidden_size,), whose product with each token of (num_tokens, hidden_size) is nearest to 1."""
    wide = hidden.double()
    gram = wide.T @ wide
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    return torch.linalg.solve(gram, wide.sum(dim=0)).float()


def _biases(logits: Tensor, common: Tensor, wanted: Tensor, top_k: int) -> Tensor:
    """What of `common`, (num_tokens,), to add to logits, (num_tokens, num_experts), for each expert's share of tokens.

    Args:
        wanted: the share of the tokens that choose each expert, (num_experts,).
    """
    biases = torch.zeros_like(wanted)
    for step in range(_BALANCING_STEPS):
        ids = (logits + common[:, None] * biases).topk(top_k).indices
        chosen = torch.bincount(ids.flatten(), minlength=len(wanted)) / len(logits)
        rate = logits.std() * (1 - step / _BALANCING_STEPS)
        biases += rate * (wanted.log() - chosen.clamp(min=1e-3).log()).clamp(-1, 1)
    return biases
