"""What a Refusal of compiled code means, in one sentence."""

from collections.abc import Callable

import torch

from .library import Refusal


def explain(
    result: int,
    made_for_call: dict[str, torch.Tensor],
    place_of_expert: torch.Tensor,
    units: str,
    unknown_place: Callable[[], str],
) -> str:
    """The sentence for a call of either operator.

    Args:
        result: one of `Refusal`.
        made_for_call: the tensors that a call makes or converts, topk_ids among them.
        place_of_expert: the table of experts, by global id.
        units: what the places are, as `8 slots`.
        unknown_place: says what is wrong with a place that is not there.
    """
    topk_ids = made_for_call["topk_ids"]
    if result == Refusal.UNKNOWN_EXPERT:
        return f"topk_ids holds {int(topk_ids.max())}, there are {place_of_expert.shape[0]} experts"
    if result == Refusal.UNKNOWN_SLOT:
        return unknown_place()
    if result == Refusal.MISSING_ADDRESS:
        freed = [name for name, tensor in made_for_call.items() if tensor.numel() and not tensor.data_ptr()]
        return f"the memory of {' and '.join(freed)} was freed"
    return f"topk_ids {list(topk_ids.shape)} or {units} are more than 32 bits can count"
