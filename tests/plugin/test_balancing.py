"""Expert-parallel load balancing of coded experts, at the level of a layer's method: on a CPU vLLM has none."""

from types import SimpleNamespace
from typing import Any

import torch
from vllm.distributed.eplb.rebalance_execute import rearrange_expert_weights_inplace
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from tests.plugin.checkpoints import Checkpoints
from tests.plugin.engine import running
from tests.tiny import HIDDEN_SIZE, NUM_EXPERTS, TOP_K

NO_PEERS = SimpleNamespace(set_transfer_context=lambda *_: None, execute=lambda: None)
ONE_RANK = SimpleNamespace(size=lambda: 1, rank=lambda: 0)


def outputs_around_a_move(model: torch.nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of every layer, before and after vLLM has moved its experts and the router's choices follow."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(9, HIDDEN_SIZE, generator=generator)
    logits = torch.randn(9, NUM_EXPERTS, generator=generator)
    weights, ids = logits.softmax(dim=1).topk(TOP_K)
    old = torch.arange(NUM_EXPERTS)
    new = torch.randperm(NUM_EXPERTS, generator=generator)
    assert (new != old).any()
    place_of_expert = torch.empty_like(new)
    place_of_expert[new] = old
    before = [layer.quant_method.apply(layer, x, weights, ids.int(), None, None) for layer in layers]
    views = [list(layer.get_expert_weights()) for layer in layers]
    # As its state does, which has room for one expert of the first layer, tensor by tensor.
    room = [torch.empty_like(view) for view in views[0]]
    maps = [indices.expand(len(layers), -1) for indices in (old, new)]
    rearrange_expert_weights_inplace(*maps, views, room, ONE_RANK, NO_PEERS)
    moved = place_of_expert[ids].int()
    after = [layer.quant_method.apply(layer, x, weights, moved, None, None) for layer in layers]
    astray = [layer.quant_method.apply(layer, x, weights, ids.int(), None, None) for layer in layers]
    assert not any(torch.equal(there, here) for there, here in zip(astray, before, strict=True))
    return list(zip(before, after, strict=True))


def test_moved_experts_give_the_same(checkpoints: Checkpoints) -> None:
    coded, _ = checkpoints.mixed("qwen3_moe", ("even",) * 3)
    with running(coded, dtype="float32") as llm:
        (outputs,) = llm.apply_model(outputs_around_a_move)
    assert len(outputs) == 3
    for before, after in outputs:
        assert before.abs().max() > 0.01
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
