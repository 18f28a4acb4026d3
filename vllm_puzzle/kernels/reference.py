"""The reference engine: plain torch, on any device; what every other engine is compared with."""

from dataclasses import dataclass

import torch

from vllm_puzzle.format import ACTIVATIONS, unpack

from .checks import check_call
from .engine import Arguments, Engine

REFERENCE = "reference"


@dataclass(frozen=True)
class ReferenceEngine(Engine):
    """Decodes the slots that have tokens, one member at a time, and waits for the device."""

    name = family = REFERENCE
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    can_be_captured = False

    def suits(self, device: torch.device) -> bool:
        return True

    def choose(self, device: torch.device, dtype: torch.dtype) -> Engine:
        return self

    def run(self, *arguments: *Arguments) -> torch.Tensor:
        check_call(self, *arguments)
        return reference_moe(*arguments)


REFERENCE_ENGINE = ReferenceEngine()


def reference_moe(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    slot_of_expert: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str,
    apply_router_weight_on_input: bool,
) -> torch.Tensor:
    """See `packed_moe`; shapes are not checked."""
    num_experts, num_slots = len(slot_of_expert), len(w13)
    if topk_ids.numel() and topk_ids.max() >= num_experts:
        raise ValueError(f"topk_ids holds {int(topk_ids.max())}, there are {num_experts} experts")
    # An id of -1 would index the last expert.
    slots = torch.where(topk_ids >= 0, slot_of_expert[topk_ids.clamp(min=0)], -1)
    activate = ACTIVATIONS[activation]
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for code in slots.unique().tolist():
        if code < 0:
            continue
        token, choice = torch.where(slots == code)
        weight = topk_weights[token, choice, None].float()
        rows = x[token].float()
        if apply_router_weight_on_input:
            # Rounded as vLLM's own experts do, which scale the activations in their dtype.
            rows = (rows * weight).to(x.dtype).float()
        slot, member = divmod(code, 2)
        if slot >= num_slots:
            raise ValueError(
                f"slot_of_expert holds {int(slot_of_expert.max())}, {num_slots} slots have codes 0 to "
                f"{2 * num_slots - 1}"
            )
        gate, up = (rows @ unpack(w13[slot], member).float().T).chunk(2, dim=-1)
        # Every fused kernel stores the inner activations in the dtype of x between its two products.
        inner = (activate(gate) * up).to(x.dtype).float()
        result = inner @ unpack(w2[slot], member).float().T
        output.index_add_(0, token, result if apply_router_weight_on_input else result * weight)
    return output.to(x.dtype)
