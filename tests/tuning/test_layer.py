"""The random layers and routings that are measured."""

import torch

from vllm_puzzle.format import unpack
from vllm_puzzle.tuning.layer import draw, random_words
from vllm_puzzle.tuning.shape import LayerShape

SHAPE = LayerShape("small", num_experts=8, hidden_size=4, intermediate_size=8, top_k=4)


def test_routing_is_as_named() -> None:
    drawn = draw(SHAPE, 50, "random")
    assert (drawn.shape, drawn.dtype) == ((50, 4), torch.int32)
    assert all(row.unique().numel() == 4 for row in drawn)
    assert drawn.unique().tolist() == list(range(8))
    mates = draw(SHAPE, 50, "mates")
    assert (mates.shape, mates.dtype) == ((50, 4), torch.int32)
    assert torch.equal(mates[:, ::2] + 1, mates[:, 1::2])
    assert not (mates[:, ::2] % 2).any()
    assert (mates[:, 0] != mates[:, 2]).all()


def test_every_random_slot_has_words_of_both_members_and_of_each_alone() -> None:
    torch.manual_seed(0)
    words = random_words(3, 64, 32, torch.device("cpu"))
    assert (words.shape, words.dtype) == ((3, 64, 32), torch.int16)
    first, second = (unpack(words, member) != 0 for member in range(2))
    for slot in range(3):
        assert (first & second)[slot].any()
        assert (first & ~second)[slot].any()
        assert (second & ~first)[slot].any()


def test_the_sizes_of_a_call_are_those_of_the_layer_in_pairs() -> None:
    odd = LayerShape("odd", num_experts=7, hidden_size=4, intermediate_size=8, top_k=3)
    assert odd.call_sizes(5)._asdict() == {
        "num_experts": 7,
        "num_slots": 4,
        "hidden_size": 4,
        "intermediate_size": 8,
        "top_k": 3,
        "num_tokens": 5,
    }
    assert odd.expert_elements == 3 * 4 * 8
