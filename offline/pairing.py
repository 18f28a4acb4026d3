"""Choosing which experts become mates."""

import random

from vllm_puzzle.format import LayerSlots

from .errors import CheckpointError


def count_pairs(num_experts: int, compression: float, max_expert_parallel: int) -> int:
    """How many pairs bring `compression` percent, rounded down to a whole pair.

    An odd number of experts leaves one single, so 50 % means as many pairs as there can be.

    Raises:
        CheckpointError: the blocks are uneven, or have too few experts each for that many pairs.
    """
    block, rest = divmod(num_experts, max_expert_parallel)
    if rest or block < 2:
        raise CheckpointError(
            f"--max-expert-parallel {max_expert_parallel} does not cut {num_experts} experts into equal blocks of "
            f"2 or more; choose a divisor of {num_experts}"
        )
    pairs = int(num_experts * compression / 100 + 1e-9)
    most = max_expert_parallel * (block // 2)
    if pairs > most:
        raise CheckpointError(
            f"--compression {compression:g} needs {pairs} pairs, but {max_expert_parallel} blocks of {block} experts "
            f"hold at most {most}; choose a smaller --max-expert-parallel or --compression "
            f"{100 * most / num_experts:.2f}"
        )
    return pairs


def pair_at_random(
    layer: int, num_experts: int, pairs: int, max_expert_parallel: int, generator: random.Random
) -> LayerSlots:
    """Mates drawn at random inside the blocks of `num_experts / max_expert_parallel` ids.

    Where not all experts are paired, which ones stay single is drawn as well. Single slots are in ascending order.
    """
    block = num_experts // max_expert_parallel
    candidates = []
    for start in range(0, num_experts, block):
        ids = list(range(start, start + block))
        generator.shuffle(ids)
        candidates += list(zip(ids[0::2], ids[1::2], strict=False))
    mates = sorted(generator.sample(candidates, pairs))
    paired = [expert for pair in mates for expert in pair]
    single = sorted(set(range(num_experts)) - set(paired))
    return LayerSlots(layer=layer, experts=paired + single, pairs=pairs)
