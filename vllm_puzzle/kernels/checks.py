"""What is wrong with a call, in one sentence; the same for every engine."""

import torch

from ..format import ACTIVATIONS, CODE_BITS, num_words
from .coded import LARGEST_CODEBOOK
from .engine import Arguments, CodedArguments, CodedTensors, Engine, Tensors, padded, padded_codes

_CODED_NAMES = ("codes", "index", "codebook", "scale")


def check_call(engine: Engine, *arguments: *Arguments) -> None:
    """Raises ValueError for an unknown activation, weights without memory, or shapes that do not fit each other."""
    x, w13, w2, slot_of_expert, topk_weights, topk_ids, activation, _ = arguments
    _check_activation(activation, "packed_moe")
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
    _check_choices(x, topk_weights, topk_ids)


def check_coded_call(engine: Engine, *arguments: *CodedArguments) -> None:
    """`check_call` for `coded_moe`; of the index, the shape alone."""
    x, *weights, expert_map, topk_weights, topk_ids, activation, _ = arguments
    _check_activation(activation, "coded_moe")
    check_coded_loaded(x, *weights, expert_map)
    hidden, intermediate = padded_codes(x.shape[1], weights[3].shape[-1], engine.multiple)
    num_experts = len(weights[1])
    for name, rows, (_, index, codebook, scale) in (
        ("w13", intermediate, weights[:4]),
        ("w2", hidden // 2, weights[4:]),
    ):
        expected = {
            "index": (num_experts, 2),
            "codebook": (num_experts, LARGEST_CODEBOOK, 2),
            "scale": (num_experts, 2, rows),
        }
        for (what, shape), tensor in zip(expected.items(), (index, codebook, scale), strict=True):
            if tensor.shape != shape:
                multiple = f", sizes rounded up to {engine.multiple}" if engine.multiple > 1 else ""
                raise ValueError(
                    f"shapes do not fit: {name}_{what} {list(tensor.shape)}, x {list(x.shape)}; expected "
                    f"{list(shape)}{multiple}"
                )
    _check_choices(x, topk_weights, topk_ids)


def check_index(name: str, expert: int, begin: int, bits: int, rows: int, columns: int, num_bytes: int) -> int:
    """The end of an expert's codes; raises ValueError where `index` sends it outside of `num_bytes`."""
    end = begin + 4 * rows * num_words(columns, bits) if bits in CODE_BITS else -1
    if begin < 0 or not begin <= end <= num_bytes:
        raise ValueError(
            f"{name}_index sends expert {expert} to byte {begin} with codes of {bits} bits, and {name}_codes has "
            f"{num_bytes} bytes"
        )
    return end


def _check_activation(activation: str, operator: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not supported; {operator} knows {sorted(ACTIVATIONS)}")


def _check_choices(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> None:
    if topk_ids.shape != topk_weights.shape or topk_ids.shape[0] != x.shape[0]:
        raise ValueError(
            f"shapes do not fit: topk_ids {list(topk_ids.shape)}, topk_weights {list(topk_weights.shape)}, "
            f"x {list(x.shape)}"
        )


def check_loaded(x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, slot_of_expert: torch.Tensor) -> None:
    """Raises ValueError where a tensor that stays from call to call has no memory behind it."""
    _check_memory("packed", x, {"w13": w13, "w2": w2, "slot_of_expert": slot_of_expert})


def check_coded_loaded(x: torch.Tensor, *staying: torch.Tensor) -> None:
    """`check_loaded` for the tensors of w13, those of w2 and the expert_map of `coded_moe`."""
    names = [f"{matrix}_{name}" for matrix in ("w13", "w2") for name in _CODED_NAMES]
    _check_memory("coded", x, dict(zip([*names, "expert_map"], staying, strict=True)))


def _check_memory(kind: str, x: torch.Tensor, staying: dict[str, torch.Tensor]) -> None:
    for name, tensor in staying.items():
        on_meta = tensor.device.type == "meta" and x.device.type != "meta"
        if on_meta or not (tensor.device.type == "meta" or has_memory(tensor)):
            state = "is on the meta device" if on_meta else "has lost its memory"
            raise ValueError(
                f"the {kind} experts cannot be computed: {name} {list(tensor.shape)} {state}, so its weights were "
                f"never loaded, or reloading them failed; load them again"
            )


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether a contiguous tensor's storage, which can be resized under it, still holds all of it."""
    words = tensor.storage_offset() + tensor.numel()
    return bool(tensor.untyped_storage().nbytes() >= words * tensor.itemsize)


def misfit(engine: Engine, *tensors: *Tensors) -> ValueError:
    """The error for a call whose shapes are right but whose types, devices or strides the engine does not take."""
    x, w13, w2, slot_of_expert, _, topk_ids = tensors
    return ValueError(
        f"types do not fit {engine.name}: x {_kind(x)}, w13 {_kind(w13)}, w2 {_kind(w2)}, slot_of_expert "
        f"{_kind(slot_of_expert)}, topk_ids {_kind(topk_ids)}; expected contiguous int16 words, an int32 table, int32 "
        f"or int64 ids, {_where(engine)}"
    )


def coded_misfit(engine: Engine, *tensors: *CodedTensors) -> ValueError:
    """`misfit` for `coded_moe`."""
    x, *weights, expert_map, _, topk_ids = tensors
    kinds = [
        f"{matrix}_{name} {_kind(tensor)}"
        for matrix, four in (("w13", weights[:4]), ("w2", weights[4:]))
        for name, tensor in zip(_CODED_NAMES, four, strict=True)
    ]
    return ValueError(
        f"types do not fit {engine.name}: x {_kind(x)}, {', '.join(kinds)}, expert_map {_kind(expert_map)}, topk_ids "
        f"{_kind(topk_ids)}; expected contiguous uint8 codes, an int64 index, bfloat16 codebooks and scales, an int32 "
        f"map, int32 or int64 ids, {_where(engine)}"
    )


def _where(engine: Engine) -> str:
    dtypes = " or ".join(str(dtype).removeprefix("torch.") for dtype in engine.dtypes)
    return f"x in {dtypes}, all on one device that the engine computes on"


def _kind(tensor: torch.Tensor) -> str:
    layout = "" if tensor.is_contiguous() else ", not contiguous"
    return f"({tensor.dtype}, {tensor.device}{layout})"
