"""Numbers that are not finite: where they are, before anything is computed with them."""

import math

import torch

from ..errors import CheckpointError


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite; makes no temporary of the tensor's size."""
    return tensor.numel() == 0 or all(math.isfinite(end.item()) for end in torch.aminmax(tensor))


def check_finite(name: str, stored: torch.Tensor, used: torch.Tensor) -> None:
    """Raises CheckpointError for the first element that is not finite; names its tensor and index.

    Args:
        stored: as the checkpoint has it, for the sentence; `used` is the same in the dtype that is computed with.
    """
    if is_finite(used):
        return
    index = (~used.isfinite()).nonzero()[0].tolist()
    dtype = str(used.dtype).removeprefix("torch.")
    raise CheckpointError(
        f"{name}{index} is {stored[tuple(index)].item():g}, which is no finite number in {dtype}; repair the checkpoint"
    )
