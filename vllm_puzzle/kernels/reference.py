"""The reference engine: plain torch, on any device; what every other engine is compared with."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_puzzle.format import ACTIVATIONS, unpack, unpack_codes

from .checks import check_call, check_coded_call, check_index
from .coded import CodedMatrices
from .engine import Arguments, CodedArguments, Engine

REFERENCE = "reference"

# From inputs (rows, columns) and an expert of the layer to gate beside up, or to its output, float32 all.
Product = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class ReferenceEngine(Engine):
    """Decodes the experts that have tokens, one at a time, and waits for the device."""

    name = family = REFERENCE
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    can_be_captured = False
    reads_codes = True

    def suits(self, device: torch.device) -> bool:
        return True

    def choose(self, device: torch.device, dtype: torch.dtype) -> Engine:
        return self

    def run(self, *arguments: *Arguments) -> torch.Tensor:
        check_call(self, *arguments)
        return reference_moe(*arguments)

    def run_coded(self, *arguments: *CodedArguments) -> torch.Tensor:
        check_coded_call(self, *arguments)
        return _reference_coded_moe(*arguments)


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
    num_slots = len(w13)

    def gate_up(rows: torch.Tensor, code: int) -> torch.Tensor:
        if code >= 2 * num_slots:
            raise ValueError(
                f"slot_of_expert holds {int(slot_of_expert.max())}, {num_slots} slots have codes 0 to "
                f"{2 * num_slots - 1}"
            )
        return rows @ unpack(w13[code // 2], code % 2).float().T

    def down(inner: torch.Tensor, code: int) -> torch.Tensor:
        return inner @ unpack(w2[code // 2], code % 2).float().T

    places = _find_places(slot_of_expert, topk_ids)
    return _sum_experts(gate_up, down, x, places, topk_weights, activation, apply_router_weight_on_input)


def _reference_coded_moe(*arguments: *CodedArguments) -> torch.Tensor:
    x, *weights, expert_map, topk_weights, topk_ids, activation, apply_router_weight_on_input = arguments
    w13, w2 = CodedMatrices(*weights[:4]), CodedMatrices(*weights[4:])

    def gate_up(rows: torch.Tensor, expert: int) -> torch.Tensor:
        if expert >= len(w13.index):
            raise ValueError(f"expert_map holds {int(expert_map.max())}, there are {len(w13.index)} experts here")
        return torch.cat([*_multiply("w13", w13, rows, expert)], dim=1)

    def down(inner: torch.Tensor, expert: int) -> torch.Tensor:
        return _multiply("w2", w2, inner, expert).permute(1, 2, 0).flatten(1)[:, : x.shape[1]]

    places = _find_places(expert_map, topk_ids)
    return _sum_experts(gate_up, down, x, places, topk_weights, activation, apply_router_weight_on_input)


def _multiply(name: str, matrices: CodedMatrices, inputs: torch.Tensor, expert: int) -> torch.Tensor:
    """The products of inputs (n, columns), float32, with both weights of every code: (2, n, rows of codes)."""
    rows, columns = matrices.scale.shape[2], inputs.shape[1]
    begin, bits = matrices.index[expert].tolist()
    end = check_index(name, expert, begin, bits, rows, columns, len(matrices.codes))
    # A copy, since a view of other integers wants them aligned.
    words = matrices.codes[begin:end].clone().view(torch.int32).view(rows, -1)
    points = matrices.codebook[expert].float()[unpack_codes(words, bits, columns).int()]
    return (inputs @ points.permute(2, 1, 0)) * matrices.scale[expert, :, None].float()


def _find_places(place_of_expert: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
    """Where the chosen experts are, -1 for a choice that is skipped."""
    if topk_ids.numel() and topk_ids.max() >= len(place_of_expert):
        raise ValueError(f"topk_ids holds {int(topk_ids.max())}, there are {len(place_of_expert)} experts")
    # An id of -1 would index the last expert.
    return torch.where(topk_ids >= 0, place_of_expert[topk_ids.clamp(min=0)], -1)


def _sum_experts(
    gate_up: Product,
    down: Product,
    x: torch.Tensor,
    places: torch.Tensor,
    topk_weights: torch.Tensor,
    activation: str,
    apply_router_weight_on_input: bool,
) -> torch.Tensor:
    """The output of all experts that have tokens, one after the other."""
    activate = ACTIVATIONS[activation]
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for place in places.unique().tolist():
        if place < 0:
            continue
        token, choice = torch.where(places == place)
        weight = topk_weights[token, choice, None].float()
        rows = x[token].float()
        if apply_router_weight_on_input:
            # Rounded as vLLM's own experts do, which scale the activations in their dtype.
            rows = (rows * weight).to(x.dtype).float()
        gate, up = gate_up(rows, place).chunk(2, dim=-1)
        # Every fused kernel stores the inner activations in the dtype of x between its two products.
        inner = (activate(gate) * up).to(x.dtype).float()
        result = down(inner, place)
        output.index_add_(0, token, result if apply_router_weight_on_input else result * weight)
    return output.to(x.dtype)
