"""moe_align_block_size and moe_sum of vLLM's compiled library where there is one, else of torch's kernels."""

from pathlib import Path

import torch

_LIBRARY = Path(__file__).with_name("_moe_C_stable_libtorch.abi3.so")
loaded = False
# Without a GPU nothing of it is called, and it need not load.
if _LIBRARY.exists() and torch.cuda.is_available():
    try:
        torch.ops.load_library(str(_LIBRARY))
        loaded = True
    except OSError as error:
        print(f"{_LIBRARY.name} does not load, torch's kernels stand in: {error}", flush=True)


def moe_align_block_size(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    sorted_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_padded: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    scatter: torch.Tensor | None = None,
) -> None:
    if loaded:
        torch.ops._moe_C.moe_align_block_size(
            topk_ids, num_experts, block_size, sorted_ids, expert_ids, num_padded, expert_map
        )
        return
    # Without waiting for the device, so that it can be captured; a dozen small kernels.
    flat = topk_ids.flatten().long()
    counts = torch.zeros(num_experts, dtype=torch.long, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
    padded = (counts + block_size - 1) // block_size * block_size
    ends, starts = padded.cumsum(0), counts.cumsum(0) - counts
    order = flat.argsort(stable=True)
    ordered = flat[order]
    places = (ends - padded)[ordered] + torch.arange(len(flat), device=flat.device) - starts[ordered]
    sorted_ids.fill_(len(flat)).scatter_(0, places, order.int())
    first = torch.arange(len(expert_ids), device=flat.device) * block_size
    expert_ids.copy_(torch.searchsorted(ends, first, right=True).clamp_(max=num_experts - 1))
    num_padded.copy_(ends[-1:])


def moe_sum(
    input: torch.Tensor,
    output: torch.Tensor,
    topk_ids: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
) -> None:
    if loaded:
        torch.ops._moe_C.moe_sum(input, output)
    else:
        torch.sum(input, dim=1, out=output)
