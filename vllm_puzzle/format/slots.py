"""Slots: which experts share one stored unit, and where an expert's weights are found."""

from collections.abc import Collection

import torch
from pydantic import model_validator

from .layout import FormatError
from .strict import Strict


class LayerSlots(Strict):
    """The experts of one MoE layer in slot order.

    The first `2 * pairs` ids are pairs (members 0 and 1 of slots 0, 1, ...), the rest are alone in their slots.
    """

    layer: int
    experts: list[int]
    pairs: int

    @model_validator(mode="after")
    def _check(self) -> "LayerSlots":
        if self.layer < 0:
            raise ValueError(f"layer {self.layer} is negative")
        if sorted(self.experts) != list(range(len(self.experts))):
            raise ValueError(
                f"layer {self.layer}: `experts` is not a permutation of 0 to {len(self.experts) - 1}: {self.experts}"
            )
        if not 0 <= 2 * self.pairs <= len(self.experts):
            raise ValueError(f"layer {self.layer}: {self.pairs} pairs do not fit {len(self.experts)} experts")
        return self

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    @property
    def num_slots(self) -> int:
        return len(self.experts) - self.pairs

    def members(self, slot: int) -> tuple[int, ...]:
        """The ids of the one or two experts in `slot`."""
        if slot < self.pairs:
            return self.experts[2 * slot], self.experts[2 * slot + 1]
        return (self.experts[self.pairs + slot],)

    def first_member(self, slot: int) -> int:
        """The id of the expert that is member 0 of `slot`, after which its tensors are named."""
        return self.members(slot)[0]

    def local_slots(self, experts: Collection[int] | None = None) -> list[int]:
        """The slots that a rank with `experts` (None: all of them) holds, in slot order.

        Raises:
            FormatError: a pair of which only one member is among `experts`.
        """
        if experts is None:
            return list(range(self.num_slots))
        held = []
        for slot in range(self.num_slots):
            members = self.members(slot)
            here = [expert for expert in members if expert in experts]
            if len(here) == len(members):
                held.append(slot)
            elif here:
                raise FormatError(
                    f"layer {self.layer}: experts {members[0]} and {members[1]} share slot {slot}, but expert "
                    f"parallelism puts only expert {here[0]} on this rank"
                )
        return held

    def slot_of_expert(self, local_slots: Collection[int] | None = None) -> torch.Tensor:
        """Where each expert is: int32 (num_experts,), `2 * position in local_slots + member`, -1 if not there."""
        table = torch.full((self.num_experts,), -1, dtype=torch.int32)
        for position, slot in enumerate(self.local_slots() if local_slots is None else local_slots):
            for member, expert in enumerate(self.members(slot)):
                table[expert] = 2 * position + member
        return table


def default_max_expert_parallel(num_experts: int) -> int:
    """The largest power of two up to 8 ranks that each hold an even number of experts, at least 4; 1 if there is none.

    Even, because a rank with an odd number of experts leaves one without a mate and 50 % out of reach.
    """
    for ranks in (8, 4, 2):
        experts_per_rank, rest = divmod(num_experts, ranks)
        if rest == 0 and experts_per_rank >= 4 and experts_per_rank % 2 == 0:
            return ranks
    return 1
