"""What packing makes of a model's size, and which graphics cards then hold it: arithmetic on sizes and a config."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from vllm_puzzle.format import Strict

from ..checkpoints.shape import MoEShape
from ..conversion.estimate import Estimate, Speed, choose_method
from ..conversion.methods import open_methods
from ..conversion.options import ConvertOptions
from ..conversion.work import Work
from ..defaults import DEFAULT_SEQUENCES, SEQUENCE_LENGTH
from ..errors import CheckpointError
from ..wording import readable
from .model_sizes import ModelSizes

GIB = 1 << 30

# Memory in MiB as the driver (nvidia-smi) shows it in total, ECC on where the card has it. NVIDIA's data sheets call
# these 24, 48, 80, 80, 141 and 180 GB.
CARDS_MIB = {
    "RTX 4090": 24564,
    "L40S": 46068,
    "A100 80GB": 81920,
    "H100 80GB": 81559,
    "H200": 143771,
    "B200": 183359,
}

# vLLM keeps the KV cache in the model's dtype unless told otherwise.
_KV_BYTES = 2


class Fit(Strict):
    """`cards` of one kind hold the weights; `kv_gib` are left on all of them together for `kv_tokens` of KV cache."""

    cards: int
    kv_gib: float
    kv_tokens: int


class CardFit(Strict):
    """One kind of card; None where no number of them that the model can be split over holds it."""

    card: str
    memory_gib: float
    before: Fit | None
    after: Fit | None


class Conversion(Strict):
    """What the converter would choose on this machine's CPU, and its estimate; `calibration_tokens` 0 is no text."""

    calibration_tokens: int
    rule: str
    align: bool
    estimate: Estimate


class Sizing(Strict):
    """Sizes in bytes before and after packing, and where they fit.

    `pairs` are those of all layers together, at `compression` percent; `bits` are those of codes a weight, None where
    experts are paired.
    """

    model: str
    read_from: Literal["headers", "index"]
    architecture: str
    num_hidden_layers: int
    moe_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    compression: float
    pairs: int
    bits: float | None
    expert_bytes_before: int
    expert_bytes_after: int
    other_bytes_before: int
    other_bytes_after: int
    total_bytes_before: int
    total_bytes_after: int
    kv_bytes_per_token: int
    context: int
    kv_bytes_of_context: int
    gpu_memory_utilization: float
    cards: list[CardFit]
    conversions: list[Conversion]


def size_model(
    sizes: ModelSizes, options: ConvertOptions, context: int | None, gpu_memory_utilization: float, speed: Speed
) -> Sizing:
    """The sizing of a model.

    Args:
        options: how it would be converted; whether there is a calibration text does not matter.
        context: None is the longest that the model was made for.

    Raises:
        CheckpointError: an option is outside its range.
    """
    config, shape = sizes.config, sizes.shape
    context = config.max_position_embeddings if context is None else context
    if context < 1:
        raise CheckpointError(f"--context {context} is not at least 1")
    if not 0 < gpu_memory_utilization <= 1:
        raise CheckpointError(f"--gpu-memory-utilization {gpu_memory_utilization:g} is not above 0 and at most 1")
    method = open_methods(options, shape)[0]
    expert_bytes_after, packed_ranks = method.expert_bytes(shape), method.expert_ranks(shape.num_experts)
    before, after = sizes.expert_bytes + sizes.other_bytes, expert_bytes_after + sizes.plain_other_bytes
    cards = [
        CardFit(
            card=card,
            memory_gib=mib / 1024,
            before=_fit(before, mib * gpu_memory_utilization, context, config, shape, shape.num_experts),
            after=_fit(after, mib * gpu_memory_utilization, context, config, shape, packed_ranks),
        )
        for card, mib in CARDS_MIB.items()
    ]
    return Sizing(
        model=readable(sizes.model),
        read_from=sizes.read_from,
        architecture=shape.family.architecture,
        num_hidden_layers=shape.num_hidden_layers,
        moe_layers=len(shape.moe_layers),
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        compression=method.provenance()["compression"],
        pairs=method.num_pairs,
        bits=options.bits,
        expert_bytes_before=sizes.expert_bytes,
        expert_bytes_after=expert_bytes_after,
        other_bytes_before=sizes.other_bytes,
        other_bytes_after=sizes.plain_other_bytes,
        total_bytes_before=before,
        total_bytes_after=after,
        kv_bytes_per_token=kv_bytes_per_token(config),
        context=context,
        kv_bytes_of_context=context * kv_bytes_per_token(config),
        gpu_memory_utilization=gpu_memory_utilization,
        cards=cards,
        conversions=_estimate_conversions(sizes, options, speed),
    )


def kv_bytes_per_token(config: Any, ranks: int = 1) -> int:
    """The bytes of one token's KV cache in all layers, BF16, on one of `ranks` tensor-parallel ranks.

    Attention is taken to be full in every layer: sliding windows need less.
    """
    if getattr(config, "kv_lora_rank", None):
        # Multi-head latent attention keeps one latent for all heads, and every rank the whole of it.
        values = config.kv_lora_rank + config.qk_rope_head_dim
    else:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        # More ranks than KV heads hold copies.
        values = 2 * max(1, _kv_heads(config) // ranks) * head_dim
    return config.num_hidden_layers * values * _KV_BYTES


def can_split(config: Any, shape: MoEShape, ranks: int, expert_ranks: int) -> bool:
    """Whether vLLM can split the model over `ranks`: attention by heads, experts by their rows or whole.

    Args:
        expert_ranks: what `ranks` has to divide where ranks hold whole experts.
    """
    kv_heads = _kv_heads(config)
    return (
        config.num_attention_heads % ranks == 0
        and (kv_heads % ranks == 0 or ranks % kv_heads == 0)
        and (shape.intermediate_size % ranks == 0 or expert_ranks % ranks == 0)
    )


def _fit(
    weight_bytes: int, usable_mib: float, context: int, config: Any, shape: MoEShape, expert_ranks: int
) -> Fit | None:
    """The fewest cards, a power of two, that hold the weights, evenly split, and one sequence of `context` tokens."""
    cards = 1
    while cards <= config.num_attention_heads:
        left = usable_mib * (1 << 20) - weight_bytes / cards
        tokens = int(left // kv_bytes_per_token(config, cards))
        if tokens >= context and can_split(config, shape, cards, expert_ranks):
            return Fit(cards=cards, kv_gib=cards * left / GIB, kv_tokens=tokens)
        cards *= 2
    return None


def work_of(sizes: ModelSizes, calibrated: bool) -> Work:
    """What there is to convert, as far as sizes tell; `calibrated` on as long a text as the converter reads."""
    config, shape = sizes.config, sizes.shape
    weights = shape.num_experts * len(shape.moe_layers) * _expert_weights(shape)
    bytes_per_weight = sizes.plain_expert_bytes / weights
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    dense_weights = max(0, int(sizes.plain_other_bytes / bytes_per_weight) - embeddings)
    layer_weights = weights / len(shape.moe_layers) + dense_weights / shape.num_hidden_layers
    return Work(
        shape,
        num_tokens=DEFAULT_SEQUENCES * min(SEQUENCE_LENGTH, config.max_position_embeddings) if calibrated else 0,
        top_k=shape.top_k,
        layer_bytes=int(layer_weights * bytes_per_weight),
        dense_weights=dense_weights,
    )


def _estimate_conversions(sizes: ModelSizes, options: ConvertOptions, speed: Speed) -> list[Conversion]:
    conversions = []
    # Only whether there is a text matters here.
    for text in (Path("text"), None):
        work = work_of(sizes, calibrated=text is not None)
        methods = open_methods(replace(options, calibration=text), sizes.shape)
        method, cost = choose_method([(method, method.estimate(work, speed)) for method in methods])
        align = method.provenance()["align"]
        conversions.append(Conversion(calibration_tokens=work.num_tokens, rule=method.rule, align=align, estimate=cost))
    return conversions


def _expert_weights(shape: MoEShape) -> int:
    return 3 * shape.hidden_size * shape.intermediate_size


def _kv_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads
