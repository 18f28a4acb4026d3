"""A call of `coded_moe` on the CPU: what compiled code may be given, and giving it."""

import torch

from ..checks import check_index
from ..coded import LARGEST_CODEBOOK
from ..engine import CodedArguments, CodedTensors
from .library import ACTIVATIONS, CALL_LAYOUT, CODES_LAYOUT, DTYPES, ID_TYPES, Isa, Refusal, load_library
from .refusal import explain
from .slots import BLOCK
from .workspace import WORKSPACE


def coded_fits(isa: Isa, *tensors: *CodedTensors) -> bool:
    """Whether `run_coded_call` takes these: compiled code sees addresses, and would trust anything."""
    x, w13_codes, w13_index, w13_codebook, w13_scale, w2_codes, w2_index, w2_codebook, w2_scale, *others = tensors
    expert_map, topk_weights, topk_ids = others
    if w13_scale.ndim != 3 or w2_scale.ndim != 3:
        return False
    num_experts, _, intermediate = w13_scale.shape
    hidden = 2 * w2_scale.shape[2]
    return (
        0 <= hidden - x.shape[1] < BLOCK
        and not hidden % BLOCK
        and not intermediate % BLOCK
        and w13_scale.shape[1] == 2
        and w2_scale.shape[:2] == w13_scale.shape[:2]
        and w13_index.shape == w2_index.shape == (num_experts, 2)
        and w13_codebook.shape == w2_codebook.shape == (num_experts, LARGEST_CODEBOOK, 2)
        and topk_ids.shape[0] == x.shape[0]
        and topk_ids.shape == topk_weights.shape
        and (x.dtype is torch.bfloat16 or (isa == Isa.PORTABLE and x.dtype in DTYPES))
        and topk_ids.dtype in ID_TYPES
        and x.is_cpu
        and topk_ids.is_cpu
        and topk_weights.is_cpu
        and _stays(expert_map, torch.int32)
        and _stays(w13_codes, torch.uint8)
        and _stays(w13_index, torch.int64)
        and _stays(w13_codebook, torch.bfloat16)
        and _stays(w13_scale, torch.bfloat16)
        and _stays(w2_codes, torch.uint8)
        and _stays(w2_index, torch.int64)
        and _stays(w2_codebook, torch.bfloat16)
        and _stays(w2_scale, torch.bfloat16)
    )


def _stays(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor of many calls is sound: its storage can be freed or cut off under it."""
    return (
        tensor.dtype is dtype
        and tensor.is_cpu
        and tensor.is_contiguous()
        and tensor.untyped_storage().nbytes() >= (tensor.storage_offset() + tensor.numel()) * dtype.itemsize
    )


def run_coded_call(isa: Isa, *arguments: *CodedArguments) -> torch.Tensor:
    """Computes `coded_moe` with arguments that fit."""
    x, w13_codes, w13_index, w13_codebook, w13_scale, w2_codes, w2_index, w2_codebook, w2_scale = arguments[:9]
    expert_map, topk_weights, topk_ids, activation, apply_router_weight_on_input = arguments[9:]
    if topk_weights.dtype is not torch.float32:
        topk_weights = topk_weights.float()
    x, topk_weights, topk_ids = x.contiguous(), topk_weights.contiguous(), topk_ids.contiguous()
    output = torch.empty_like(x)
    matrices = (
        *(w13_index.data_ptr(), w13_codebook.data_ptr(), w13_scale.data_ptr(), w13_codes.numel()),
        *(w2_index.data_ptr(), w2_codebook.data_ptr(), w2_scale.data_ptr(), w2_codes.numel()),
    )
    addresses = [tensor.data_ptr() for tensor in (x, w13_codes, w2_codes, expert_map, topk_weights, topk_ids, output)]
    sizes = (*x.shape, 2 * w2_scale.shape[2], w13_scale.shape[2], w13_index.shape[0])
    counts = (expert_map.shape[0], topk_ids.shape[1])
    choices = (ID_TYPES[topk_ids.dtype], DTYPES[x.dtype], ACTIVATIONS[activation], apply_router_weight_on_input, isa, 0)
    run = load_library().puzzlemoe_coded_moe
    with WORKSPACE.lock:
        # A second turn only where the workspace was too small, which `prepare_codes` is there to prevent.
        for _ in range(2):
            room = (WORKSPACE.address, WORKSPACE.num_bytes)
            CALL_LAYOUT.pack_into(WORKSPACE.call, 0, *addresses, *room, *sizes, *counts, *choices)
            CODES_LAYOUT.pack_into(WORKSPACE.call, CALL_LAYOUT.size, *matrices)
            result: int = run(WORKSPACE.call)
            if result <= 0:
                break
            WORKSPACE.grow(result)
    if result < 0:
        _refuse(result, arguments, {"x": x, "topk_weights": topk_weights, "topk_ids": topk_ids, "output": output})
    return output


def _refuse(result: int, arguments: CodedArguments, made_for_call: dict[str, torch.Tensor]) -> None:
    """Raises what a Refusal means for these tensors."""
    _, w13_codes, w13_index, _, w13_scale, w2_codes, w2_index, _, w2_scale, expert_map, *_ = arguments
    topk_ids, num_experts = made_for_call["topk_ids"], w13_index.shape[0]
    if result == Refusal.UNKNOWN_CODES:
        rows = {"w13": w13_scale.shape[2], "w2": w2_scale.shape[2]}
        columns = {"w13": 2 * rows["w2"], "w2": rows["w13"]}
        for expert in expert_map[topk_ids[topk_ids >= 0].long()].unique().tolist():
            for name, codes, index in (("w13", w13_codes, w13_index), ("w2", w2_codes, w2_index)):
                if expert >= 0:
                    begin, bits = index[expert].tolist()
                    check_index(name, expert, begin, bits, rows[name], columns[name], codes.numel())

    def unknown() -> str:
        return f"expert_map holds {int(expert_map.max())}, there are {num_experts} experts here"

    raise ValueError(explain(result, made_for_call, expert_map, f"{num_experts} experts", unknown))
