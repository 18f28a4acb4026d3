"""What is wrong with a call, in one sentence; the same for every engine."""

import torch

from ..format import ACTIVATIONS
from .engine import Arguments, Engine, Tensors, padded


def check_call(engine: Engine, *arguments: *Arguments) -> None:
    """Raises ValueError for an unknown activation, weights without memory, or shapes that do not fit each other."""
    x, w13, w2, slot_of_expert, topk_weights, topk_ids, activation, _ = arguments
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not supported; packed_moe knows {sorted(ACTIVATIONS)}")
    check_loaded(x, w13, w2, slot_of_expert)
    num_slots, rows, columns = w13.shape
    multiple = engine.multiple
    if (
        columns != padded(x.shape[1], multiple)
        or rows % (2 * multiple)
        or tuple(w2.shape) != (num_slots, columns, rows // 2)
    ):
        raise ValueError(
            f"shapes do not fit: x {list(x.shape)}, w13 {list(w13.shape)}, w2 {list(w2.shape)}; expected x (M, H), "
            f"w13 (slots, 2 I, H), w2 (slots, H, I){f', H and I rounded up to {multiple}' if multiple > 1 else ''}"
        )
    if topk_ids.shape != topk_weights.shape or topk_ids.shape[0] != x.shape[0]:
        raise ValueError(
            f"shapes do not fit: topk_ids {list(topk_ids.shape)}, topk_weights {list(topk_weights.shape)}, "
            f"x {list(x.shape)}"
        )


def check_loaded(x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, slot_of_expert: torch.Tensor) -> None:
    """Raises ValueError where a tensor that stays from call to call has no memory behind it."""
    for name, tensor in (("w13", w13), ("w2", w2), ("slot_of_expert", slot_of_expert)):
        on_meta = tensor.device.type == "meta" and x.device.type != "meta"
        if on_meta or not (tensor.device.type == "meta" or has_memory(tensor)):
            state = "is on the meta device" if on_meta else "has lost its memory"
            raise ValueError(
                f"the packed experts cannot be computed: {name} {list(tensor.shape)} {state}, so its weights were "
                f"never loaded, or reloading them failed; load them again"
            )


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether a contiguous tensor's storage, which can be resized under it, still holds all of it."""
    words = tensor.storage_offset() + tensor.numel()
    return bool(tensor.untyped_storage().nbytes() >= words * tensor.itemsize)


def misfit(engine: Engine, *tensors: *Tensors) -> ValueError:
    """The error for a call whose shapes are right but whose types, devices or strides the engine does not take."""
    x, w13, w2, slot_of_expert, _, topk_ids = tensors
    dtypes = " or ".join(str(dtype).removeprefix("torch.") for dtype in engine.dtypes)
    return ValueError(
        f"types do not fit {engine.name}: x {_kind(x)}, w13 {_kind(w13)}, w2 {_kind(w2)}, slot_of_expert "
        f"{_kind(slot_of_expert)}, topk_ids {_kind(topk_ids)}; expected contiguous int16 words, an int32 table, int32 "
        f"or int64 ids, x in {dtypes}, all on one device that the engine computes on"
    )


def _kind(tensor: torch.Tensor) -> str:
    layout = "" if tensor.is_contiguous() else ", not contiguous"
    return f"({tensor.dtype}, {tensor.device}{layout})"
