"""How much there is to convert: what the estimate of a conversion's cost is made from."""

import math
from dataclasses import dataclass

from ..checkpoints.expert_tensors import expected_experts
from ..checkpoints.families import MoEShape
from .job import Setup


@dataclass(frozen=True)
class Work:
    """What there is to convert.

    Attributes:
        num_tokens: calibration tokens, 0 without a text.
        top_k: experts that a token is routed to.
        layer_bytes: bytes of the largest decoder layer as it is read.
        dense_weights: weights of all decoder layers outside their routed experts.
        jobs: layers that are converted at once.
        on_gpu: operations are launched one by one.
    """

    shape: MoEShape
    num_tokens: int
    top_k: int
    layer_bytes: int
    dense_weights: int
    jobs: int = 1
    on_gpu: bool = False


def measure_work(setup: Setup) -> Work:
    """The work of a conversion, from the headers of its source."""
    tensors, experts = setup.checkpoint.tensors, expected_experts(setup.shape)
    layers = [setup.names[layer] for layer in setup.decoder_layers]
    return Work(
        setup.shape,
        num_tokens=0 if setup.calibrator is None else setup.calibrator.token_ids.numel(),
        top_k=setup.checkpoint.config.num_experts_per_tok,
        layer_bytes=max(sum(tensors[name].plain_bytes for name in names) for names in layers),
        dense_weights=sum(math.prod(tensors[name].shape) for names in layers for name in names if name not in experts),
        jobs=setup.options.jobs,
        on_gpu=setup.device.type == "cuda",
    )
