"""How much there is to convert: what the estimate of a conversion's cost is made from."""

import math
from dataclasses import dataclass

from ..checkpoints.expert_tensors import expected_experts
from ..checkpoints.shape import MoEShape
from ..merging.layer import TOKENS_AT_ONCE
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

    @property
    def expert_weights(self) -> int:
        """Weights of one expert."""
        return 3 * self.shape.hidden_size * self.shape.intermediate_size

    @property
    def routed(self) -> int:
        """How often a token reaches an expert, in all layers together."""
        return self.num_tokens * self.top_k * len(self.shape.moe_layers)

    @property
    def through(self) -> int:
        """Operations of products that carry all tokens once through the model."""
        return 2 * self.routed * self.expert_weights + 2 * self.num_tokens * self.dense_weights

    def token_bytes(self, paths: int) -> int:
        """What the tokens take in memory on so many paths through the layers."""
        hidden, inner = self.shape.hidden_size, self.shape.intermediate_size
        # The hidden states, what enters the experts and their output in float32; where tokens go.
        num_bytes = self.num_tokens * hidden * (2 * paths + 2 + 4 * paths) + self.num_tokens * self.top_k * 12
        return num_bytes + min(self.num_tokens, TOKENS_AT_ONCE) * (6 * hidden + 8 * inner) * 4


def measure_work(setup: Setup) -> Work:
    """The work of a conversion, from the headers of its source."""
    tensors, experts = setup.checkpoint.tensors, expected_experts(setup.shape)
    layers = [setup.names[layer] for layer in setup.decoder_layers]
    return Work(
        setup.shape,
        num_tokens=0 if setup.calibrator is None else setup.calibrator.token_ids.numel(),
        top_k=setup.shape.top_k,
        layer_bytes=max(sum(tensors[name].plain_bytes for name in names) for names in layers),
        dense_weights=sum(math.prod(tensors[name].shape) for names in layers for name in names if name not in experts),
        jobs=setup.options.jobs,
        on_gpu=setup.device.type == "cuda",
    )
