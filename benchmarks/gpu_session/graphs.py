"""A call in a CUDA graph is replayed with other tokens and routing, and waits for nothing."""

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.gpu_session.correctness import INTERPRETED, TOLERANCE
from benchmarks.gpu_session.workload import Workload
from vllm_puzzle.kernels import REFERENCE
from vllm_puzzle.tuning.card import Card
from vllm_puzzle.tuning.layer import PackedLayer, draw, relative_difference

Say = Callable[..., None]

REPLAYS = 3


def check_graphs(card: Card, workload: Workload, say: Say) -> None:
    """Says whether every replay is right, and whether a call waits for the device."""
    shape = workload.checked[0]
    layer = PackedLayer(shape, card.device)
    tolerance = TOLERANCE["bfloat16"] * (INTERPRETED if card.device.type == "cpu" else 1)
    for num_tokens in workload.graph_tokens:
        x = torch.randn(num_tokens, shape.hidden_size, dtype=torch.bfloat16, device=card.device)
        ids = draw(shape, num_tokens).to(card.device)
        weights = torch.rand(ids.shape, device=card.device)
        call = partial(layer.run, x, weights, ids)
        replay, (output,) = card.capture([call])
        for turn in range(REPLAYS):
            ids.copy_(draw(shape, num_tokens))
            ids[:: turn + 2] = -1
            x.normal_()
            replay()
            difference = relative_difference(output, layer.run(x, weights, ids, REFERENCE))
            say(what="graph", tokens=num_tokens, difference=float(f"{difference:.3g}"), ok=difference <= tolerance)
        if card.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
            try:
                call()
            except RuntimeError as error:
                say(what="waits", tokens=num_tokens, ok=False, error=str(error)[:300])
            else:
                say(what="waits", tokens=num_tokens, ok=True)
            finally:
                torch.cuda.set_sync_debug_mode("default")
