"""The loader of packed tensors: which part goes where on a rank, and what is counted."""

import pytest
import torch

from vllm_puzzle.format import FormatError, LayerSlots
from vllm_puzzle.plugin.loader import PackedExpertLoader, Projection, Rank


def make_loader(local_slots: list[int] | None = None, tp_rank: int = 0, tp_size: int = 1) -> PackedExpertLoader:
    slots = LayerSlots(layer=0, experts=[1, 0, 2, 3], pairs=1)
    return PackedExpertLoader(
        layer_name="model.layers.0.mlp.experts",
        slots=slots,
        local_slots=slots.local_slots() if local_slots is None else local_slots,
        projections={
            "w1": Projection("gate_proj", (4, 6)),
            "w3": Projection("up_proj", (4, 6)),
            "w2": Projection("down_proj", (6, 4)),
        },
        rank=Rank(tp_rank, tp_size),
    )


def parameter(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(shape, dtype=torch.int16), requires_grad=False)


def test_tensor_parallel_ranks_load_their_own_rows_and_columns() -> None:
    gate, up, down = (torch.arange(24, dtype=torch.int16).view(4, 6) + 100 * i for i in range(3))
    down = down.reshape(6, 4)
    for rank in (0, 1):
        loader, w13, w2 = make_loader(tp_rank=rank, tp_size=2), parameter(3, 4, 6), parameter(3, 6, 2)
        for weight, shard, target in ((gate, "w1", w13), (up, "w3", w13), (down, "w2", w2)):
            # Positionally, as vLLM's older models call it.
            assert loader(target, weight, "name", shard, 2, True)
        mine = slice(2 * rank, 2 * rank + 2)
        assert torch.equal(w13[1], torch.cat([gate[mine], up[mine]]))
        assert torch.equal(w2[1], down[:, mine])
        assert not w13[[0, 2]].any()


def test_padding_is_zero_whatever_was_there() -> None:
    """On a reload the padded parameters hold words in tile order, zero or not where this rank's part ends."""
    gate, up, down = (torch.arange(24, dtype=torch.int16).view(4, 6) + 100 * i for i in range(3))
    down = down.reshape(6, 4)
    for rank in (0, 1):
        loader, w13, w2 = make_loader(tp_rank=rank, tp_size=2), parameter(3, 64, 32), parameter(3, 32, 32)
        w13.fill_(7)
        w2.fill_(7)
        for weight, shard, target in ((gate, "w1", w13), (up, "w3", w13), (down, "w2", w2)):
            assert loader(target, weight, "name", shard, 2, True)
        mine = slice(2 * rank, 2 * rank + 2)
        expected13, expected2 = torch.zeros(64, 32, dtype=torch.int16), torch.zeros(32, 32, dtype=torch.int16)
        expected13[:2, :6], expected13[32:34, :6], expected2[:6, :2] = gate[mine], up[mine], down[:, mine]
        assert torch.equal(w13[1], expected13)
        assert torch.equal(w2[1], expected2)


def test_an_expert_parallel_rank_counts_its_own_slots_only() -> None:
    loader, w13, w2 = make_loader(local_slots=[1]), parameter(1, 8, 6), parameter(1, 6, 4)
    gate, down = torch.ones(4, 6, dtype=torch.int16), torch.ones(6, 4, dtype=torch.int16)
    assert loader(w13, gate, "name", "w1", 1, return_success=True) is False
    assert loader(w13, gate, "name", "w1", 2, return_success=True) is True
    with pytest.raises(FormatError, match=r"2 of 3 packed tensors .*experts\.2\.up_proj.*experts\.2\.down_proj"):
        loader.finish()
    with pytest.raises(FormatError, match=r"experts\.2\.gate_proj.* more than once"):
        loader(w13, gate, "name", "w1", 2)
    with pytest.raises(FormatError, match=r"experts\.0\.gate_proj.* is unexpected"):
        loader(w13, gate, "name", "w1", 0)
    loader(w13, gate, "name", "w3", 2)
    loader(w2, down, "name", "w2", 2)
    loader.finish()
    # A reload starts over.
    assert loader(w13, gate, "name", "w1", 2, return_success=True) is True
