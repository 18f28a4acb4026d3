"""The CPU engine: packed slots in tile order, multiplied by the compiled kernels."""

import ctypes
import math
import mmap
import threading
import warnings

import torch

from .library import CALL_LAYOUT, Isa, load_library

# Rows and columns come in blocks of 32 (csrc/tiles.h).
_BLOCK = 32
_CACHE_LINE = 64
_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2}


class _Workspace:
    """The one buffer that all layers of the process share, since they run one after the other."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.address = 0
        self.num_bytes = 0
        self.call = ctypes.create_string_buffer(CALL_LAYOUT.size)
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def grow(self, num_bytes: int) -> None:
        if num_bytes > self.num_bytes:
            # The old one goes first: both at once would be a peak that nobody asked for. Its size goes with it, since
            # there may be no memory for the new one.
            self.address = self.num_bytes = 0
            self._buffer = torch.empty(0, dtype=torch.uint8)
            self._buffer = torch.empty(num_bytes + _CACHE_LINE, dtype=torch.uint8)
            self.address = -(-self._buffer.data_ptr() // _CACHE_LINE) * _CACHE_LINE
            self.num_bytes = num_bytes


_workspace = _Workspace()


def padded(size: int) -> int:
    """`size` rounded up to the next multiple of 32, which is what the kernels compute in."""
    return -(-size // _BLOCK) * _BLOCK


def empty_slots(num_slots: int, rows: int, columns: int) -> torch.Tensor:
    """Zero words for slots that are still to be loaded, on huge pages: decoding is one stream through memory.

    Returns:
        (num_slots, rows, columns), int16.
    """
    shape = (num_slots, rows, columns)
    if not math.prod(shape):
        return torch.zeros(shape, dtype=torch.int16)
    memory = mmap.mmap(-1, 2 * math.prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        warnings.warn(f"packed experts lie on small pages, which slows them down: {error}", stacklevel=2)
    return torch.frombuffer(memory, dtype=torch.int16).view(shape)


def tile_slots_(w13: torch.Tensor, w2: torch.Tensor) -> None:
    """Puts words into the order in which the kernels read them, in place, with a copy of one slot at a time.

    Args:
        w13: (num_slots, 2 * padded intermediate_size, padded hidden_size), int16, gate rows above up rows.
        w2: (num_slots, padded hidden_size, padded intermediate_size), int16.

    Raises:
        ValueError: sizes that are not multiples of 32, or tensors that are not contiguous int16 on the CPU, with memory
            of their own for every word.
    """
    half = w13.shape[1] // 2
    for name, words, block in (("w13", w13, 2 * _BLOCK), ("w2", w2, _BLOCK)):
        if (
            words.shape[1] % block
            or words.shape[2] % _BLOCK
            or not words.is_contiguous()
            or words.dtype != torch.int16
            or not words.is_cpu
            or not has_memory(words)
        ):
            raise ValueError(
                f"{name} must be contiguous int16 words on the CPU in sizes that are multiples of {_BLOCK}; it is "
                f"{words.dtype} {list(words.shape)} on {words.device}, with {words.untyped_storage().nbytes()} bytes "
                f"of memory"
            )
    library = load_library()
    scratch = torch.empty(max(w13.shape[1] * w13.shape[2], w2.shape[1] * w2.shape[2]), dtype=torch.int16)
    for words, first_step, second_begin in ((w13, _BLOCK // 2, half), (w2, _BLOCK, _BLOCK // 2)):
        for slot in words:
            library.puzzlemoe_tile_slot(
                slot.data_ptr(), scratch.data_ptr(), words.shape[1], words.shape[2], first_step, second_begin
            )


def reserve_workspace(isa: Isa, w2: torch.Tensor, max_num_tokens: int, top_k: int) -> None:
    """Makes room for calls of up to `max_num_tokens` tokens with these weights; a larger call makes its own."""
    num_slots, padded_hidden, padded_intermediate = w2.shape
    with _workspace.lock:
        sizes = (0, max_num_tokens, padded_hidden, padded_hidden, padded_intermediate, num_slots, 0, top_k)
        CALL_LAYOUT.pack_into(_workspace.call, 0, *[0] * 8, *sizes, 0, 0, 0, 0, isa, 0)
        _workspace.grow(load_library().puzzlemoe_workspace_bytes(_workspace.call))


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether a contiguous tensor's storage, which can be resized under it, still holds all of it."""
    words = tensor.storage_offset() + tensor.numel()
    return bool(tensor.untyped_storage().nbytes() >= words * tensor.itemsize)


def fits_cpu(
    isa: Isa,
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    slot_of_expert: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> bool:
    """Whether `cpu_moe` takes these: compiled code sees addresses, and would trust anything."""
    num_slots, rows, columns = w13.shape
    num_tokens, hidden_size = x.shape
    return (
        0 <= columns - hidden_size < _BLOCK
        and not columns % _BLOCK
        and not rows % (2 * _BLOCK)
        and w2.shape == (num_slots, columns, rows // 2)
        and topk_ids.shape[0] == num_tokens
        and topk_ids.shape == topk_weights.shape
        and (x.dtype is torch.bfloat16 or (isa == Isa.PORTABLE and x.dtype in _DTYPES))
        and w13.dtype is torch.int16
        and w2.dtype is torch.int16
        and slot_of_expert.dtype is torch.int32
        and (topk_ids.dtype is torch.int32 or topk_ids.dtype is torch.int64)
        and w13.is_contiguous()
        and w2.is_contiguous()
        and slot_of_expert.is_contiguous()
        and x.is_cpu
        and w13.is_cpu
        and w2.is_cpu
        and slot_of_expert.is_cpu
        and topk_ids.is_cpu
        and topk_weights.is_cpu
        # A storage can be freed or cut off under what stays from call to call. Compiled code notices a null address,
        # which is enough for what was made a moment ago.
        and w13.untyped_storage().nbytes() >= num_slots * rows * columns * 2
        and w2.untyped_storage().nbytes() >= num_slots * rows * columns
        and slot_of_expert.untyped_storage().nbytes() >= slot_of_expert.shape[0] * 4
    )


def cpu_moe(
    isa: Isa,
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    slot_of_expert: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: str,
    apply_router_weight_on_input: bool,
) -> torch.Tensor:
    """See `packed_moe`, which has checked the arguments; w13 and w2 are as `tile_slots_` left them.

    The result does not depend on the number of threads.
    """
    if topk_weights.dtype is not torch.float32:
        topk_weights = topk_weights.float()
    if not (x.is_contiguous() and topk_weights.is_contiguous() and topk_ids.is_contiguous()):
        x, topk_weights, topk_ids = x.contiguous(), topk_weights.contiguous(), topk_ids.contiguous()
    num_tokens, hidden_size = x.shape
    num_slots, padded_hidden, padded_intermediate = w2.shape
    output = torch.empty_like(x)
    run = load_library().puzzlemoe_packed_moe
    with _workspace.lock:
        # A second turn only where the workspace was too small, which `reserve_workspace` is there to prevent.
        for _ in range(2):
            CALL_LAYOUT.pack_into(
                _workspace.call,
                0,
                x.data_ptr(),
                w13.data_ptr(),
                w2.data_ptr(),
                slot_of_expert.data_ptr(),
                topk_weights.data_ptr(),
                topk_ids.data_ptr(),
                output.data_ptr(),
                _workspace.address,
                _workspace.num_bytes,
                num_tokens,
                hidden_size,
                padded_hidden,
                padded_intermediate,
                num_slots,
                slot_of_expert.shape[0],
                topk_ids.shape[1],
                topk_ids.dtype is torch.int64,
                _DTYPES[x.dtype],
                _ACTIVATIONS[activation],
                apply_router_weight_on_input,
                isa,
                0,
            )
            result: int = run(_workspace.call)
            if result <= 0:
                break
            _workspace.grow(result)
    if result < 0:
        tensors = {"x": x, "topk_weights": topk_weights, "topk_ids": topk_ids, "output": output}
        raise ValueError(_refusal(result, tensors, slot_of_expert, num_slots))
    return output


def _refusal(result: int, tensors: dict[str, torch.Tensor], slot_of_expert: torch.Tensor, num_slots: int) -> str:
    """What a PuzzleMoeRefusal of csrc/abi.h means for these tensors."""
    if result == -1:
        return f"topk_ids holds {int(tensors['topk_ids'].max())}, there are {slot_of_expert.shape[0]} experts"
    if result == -2:
        return (
            f"slot_of_expert holds {int(slot_of_expert.max())}, {num_slots} slots have codes 0 to {2 * num_slots - 1}"
        )
    if result == -3:
        freed = [name for name, tensor in tensors.items() if tensor.numel() and not tensor.data_ptr()]
        return f"the memory of {' and '.join(freed)} was freed"
    return f"topk_ids {list(tensors['topk_ids'].shape)} or {num_slots} slots are more than 32 bits can count"
