"""The methods that merging is compared with, held against their definitions and against layers made to suit them."""

import itertools
import random

import pytest
import torch
from torch.nn.functional import silu

from benchmarks.quality.peers import PEERS, CompressedLayer, LoggedTokens
from benchmarks.round_to_nearest import round_to_fp8, round_to_int4
from vllm_puzzle.offline.merging.layer import ExpertWeights

NUM_EXPERTS, HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_TOKENS, TOP_K = 8, 24, 16, 200, 2
NO_LOGITS = torch.zeros(0, NUM_EXPERTS)
MATRICES = ("gate", "up", "down")
PAIRS = [(0, 5), (1, 4), (2, 7), (3, 6)]


def random_experts(
    num_experts: int = NUM_EXPERTS, hidden_size: int = HIDDEN_SIZE, intermediate_size: int = INTERMEDIATE_SIZE
) -> ExpertWeights:
    generator = torch.Generator().manual_seed(1)
    gate, up = (
        [torch.randn(intermediate_size, hidden_size, generator=generator) for _ in range(num_experts)] for _ in range(2)
    )
    down = [torch.randn(hidden_size, intermediate_size, generator=generator) for _ in range(num_experts)]
    return ExpertWeights(gate, up, down, silu)


def route(hidden: torch.Tensor, logits: torch.Tensor, top_k: int = TOP_K) -> LoggedTokens:
    weights, ids = logits.softmax(dim=1).topk(top_k)
    return LoggedTokens(hidden, ids, weights, logits)


def random_tokens(unused: tuple[int, ...] = (), num_tokens: int = NUM_TOKENS) -> LoggedTokens:
    """Tokens of few directions and unequal channels; no token goes to the experts in `unused`."""
    generator = torch.Generator().manual_seed(2)
    latent = torch.randn(num_tokens, 6, generator=generator) @ torch.randn(6, HIDDEN_SIZE, generator=generator)
    noise = torch.randn(num_tokens, HIDDEN_SIZE, generator=generator)
    hidden = (latent + 0.3 * noise) * torch.linspace(0.2, 2, HIDDEN_SIZE)
    logits = torch.randn(num_tokens, NUM_EXPERTS, generator=generator) + torch.linspace(1, -1, NUM_EXPERTS)
    logits[:, list(unused)] = -100.0
    return route(hidden, logits)


def paired_experts(noise: float = 1e-4) -> ExpertWeights:
    """Of each pair in PAIRS the second is the first but for `noise`."""
    experts = random_experts()
    generator = torch.Generator().manual_seed(3)
    for first, second in PAIRS:
        for name in MATRICES:
            weights = getattr(experts, name)
            weights[second] = weights[first] + noise * torch.randn(weights[first].shape, generator=generator)
    return experts


def compress(slug: str, experts: ExpertWeights, tokens: LoggedTokens) -> CompressedLayer:
    return PEERS[slug].method(experts, tokens, random.Random(0))


def clusters(experts: ExpertWeights) -> list[tuple[int, ...]]:
    """The experts that hold equal weights, by lowest member."""
    found: dict[int, list[int]] = {}
    for expert in range(experts.num_experts):
        alike = (
            other
            for other in found
            if all(torch.equal(getattr(experts, name)[expert], getattr(experts, name)[other]) for name in MATRICES)
        )
        found.setdefault(next(alike, expert), []).append(expert)
    return [tuple(members) for members in found.values()]


def error(compressed: ExpertWeights, experts: ExpertWeights, tokens: LoggedTokens) -> float:
    """Of the layer's output, relative."""
    expected = tokens.through(experts)
    return ((tokens.through(compressed) - expected).norm() / expected.norm()).item()


def wanda_by_element(weight: torch.Tensor, inputs: torch.Tensor) -> list[list[float]]:
    norms = [sum(value * value for value in column) ** 0.5 for column in inputs.T.tolist()]
    rows = []
    for row in weight.tolist():
        order = sorted(range(len(row)), key=lambda column: abs(row[column]) * norms[column])
        dropped = order[: len(row) // 2]
        rows.append([0.0 if column in dropped else value for column, value in enumerate(row)])
    return rows


def test_wanda_keeps_what_its_score_says() -> None:
    experts, tokens = random_experts(), random_tokens(unused=(3,))
    pruned = compress("wanda", experts, tokens).experts
    for expert in range(NUM_EXPERTS):
        own = tokens.hidden[tokens.of(expert)[0]]
        inputs = {"gate": own, "up": own, "down": experts.intermediate(expert, own)}
        for name in MATRICES:
            weight, result = getattr(experts, name)[expert], getattr(pruned, name)[expert]
            # Expert 3 has no tokens, so the largest magnitudes stay.
            by = inputs[name] if len(own) else torch.ones(1, weight.shape[1])
            assert result.tolist() == wanda_by_element(weight, by)
            assert (result == 0).sum(dim=1).tolist() == [weight.shape[1] // 2] * len(weight)


def surgeon(weight: torch.Tensor, inputs: torch.Tensor, blocks: list[range]) -> torch.Tensor:
    """SparseGPT as it is derived: after each column, H restricted to the columns behind it is inverted anew."""
    weight = weight.double().clone()
    hessian = inputs.double().T @ inputs.double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    inverses = {column: hessian[column:, column:].inverse() for block in blocks for column in block}
    for block in blocks:
        scores = torch.stack([weight[:, column] ** 2 / inverses[column][0, 0] for column in block], dim=1)
        dropped = scores <= scores.flatten().sort().values[scores.numel() // 2 - 1]
        for index, column in enumerate(block):
            step = weight[:, column] * dropped[:, index] / inverses[column][0, 0]
            weight[:, column:] -= step[:, None] * inverses[column][0]
    return weight


def test_sparsegpt_is_the_optimal_brain_surgeon_column_by_column() -> None:
    # Two masks, of 128 columns and of 12.
    experts = random_experts(num_experts=2, hidden_size=140, intermediate_size=12)
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(300, 140, generator=generator) @ torch.randn(140, 140, generator=generator)
    tokens = route(hidden, torch.randn(300, 2, generator=generator), top_k=1)
    pruned = compress("sparsegpt", experts, tokens).experts
    blocks = [range(128), range(128, 140)]
    for expert in range(2):
        own = hidden[tokens.of(expert)[0]]
        for name in ("gate", "up"):
            result = getattr(pruned, name)[expert]
            torch.testing.assert_close(
                result.double(), surgeon(getattr(experts, name)[expert], own, blocks), rtol=0, atol=0.01
            )
            assert [(result[:, block] == 0).sum() for block in blocks] == [12 * 64, 12 * 6]
        expected = surgeon(experts.down[expert], pruned.intermediate(expert, own), [range(12)])
        torch.testing.assert_close(pruned.down[expert].double(), expected, rtol=0, atol=0.01)


def test_sparsegpt_loses_less_than_wanda() -> None:
    experts, tokens = random_experts(), random_tokens()
    errors = {slug: error(compress(slug, experts, tokens).experts, experts, tokens) for slug in ("wanda", "sparsegpt")}
    assert 0 < errors["sparsegpt"] < 0.7 * errors["wanda"]


def test_sparsegpt_of_uncorrelated_inputs_keeps_magnitudes() -> None:
    experts = random_experts(num_experts=2)
    orthonormal = torch.linalg.qr(torch.randn(NUM_TOKENS, HIDDEN_SIZE, generator=torch.Generator().manual_seed(5)))[0]
    # All tokens are expert 0's; expert 1 has none.
    tokens = route(orthonormal, torch.tensor([[1.0, 0.0]]).expand(NUM_TOKENS, 2), top_k=1)
    pruned = compress("sparsegpt", experts, tokens).experts
    for name, expert in (("gate", 0), ("up", 0), ("gate", 1), ("up", 1), ("down", 1)):
        weight = getattr(experts, name)[expert]
        largest = weight.abs() > weight.abs().median()
        torch.testing.assert_close(getattr(pruned, name)[expert], weight * largest, rtol=0, atol=1e-4)


def test_reap_drops_the_least_mean_of_weighted_output_norms() -> None:
    experts, tokens = random_experts(), random_tokens(unused=(2,))
    # Rarely used but loud, and often used but faint: frequency and saliency disagree.
    experts.down[7] *= 10
    experts.down[0] *= 0.01
    sums, counts = [0.0] * NUM_EXPERTS, [0] * NUM_EXPERTS
    for token in range(NUM_TOKENS):
        for choice in range(TOP_K):
            expert = int(tokens.topk_ids[token, choice])
            norm = experts.output(expert, tokens.hidden[token : token + 1]).norm().item()
            sums[expert] += tokens.topk_weights[token, choice].item() * norm
            counts[expert] += 1
    means = [total / max(count, 1) for total, count in zip(sums, counts, strict=True)]
    result = compress("reap", experts, tokens)
    assert result.dropped == set(sorted(range(NUM_EXPERTS), key=lambda expert: means[expert])[:4])
    assert {0, 2} <= result.dropped
    assert 7 not in result.dropped
    assert error(result.experts, experts, tokens) == 0


def test_frequency_drops_the_least_used_and_of_equals_the_higher_id() -> None:
    experts = random_experts()
    chosen = [0] * 3 + [1] * 1 + [2] * 5 + [3] * 2 + [4] * 2 + [5] * 2 + [7] * 9
    ids = torch.tensor(chosen).reshape(-1, 2)
    tokens = LoggedTokens(torch.randn(len(ids), HIDDEN_SIZE), ids, torch.full(ids.shape, 0.5), NO_LOGITS)
    # 7, 2 and 0 stay, and of 3, 4 and 5 with two tokens each the lowest.
    assert compress("frequency", experts, tokens).dropped == {1, 4, 5, 6}
    silent = LoggedTokens(torch.zeros(len(ids), HIDDEN_SIZE), ids, torch.full(ids.shape, 0.5), NO_LOGITS)
    assert compress("reap", experts, silent).dropped == {4, 5, 6, 7}


@pytest.mark.parametrize("slug", ["hc-smoe", "sub-moe"])
def test_experts_that_compute_the_same_are_merged_by_frequency(slug: str) -> None:
    # Nobody uses the pair of 1 and 4, and of 2 and 7 only one is used.
    experts, tokens = paired_experts(), random_tokens(unused=(1, 4, 7))
    merged = compress(slug, experts, tokens).experts
    assert clusters(merged) == PAIRS
    assert 0 < error(merged, experts, tokens) < 1e-3
    for first, second in PAIRS:
        counts = [len(tokens.of(expert)[0]) for expert in (first, second)]
        share = counts[0] / sum(counts) if sum(counts) else 0.5
        for name in MATRICES:
            weights = getattr(experts, name)
            expected = weights[first] * share + weights[second] * (1 - share)
            torch.testing.assert_close(getattr(merged, name)[first], expected, rtol=0, atol=1e-5)


def test_only_cosines_ignore_how_large_an_output_is() -> None:
    experts = paired_experts()
    for _, second in PAIRS:
        experts.down[second] = 5 * experts.down[second]
    assert clusters(compress("sub-moe", experts, random_tokens()).experts) == PAIRS
    assert clusters(compress("hc-smoe", experts, random_tokens()).experts) != PAIRS


def test_hc_smoe_links_by_average() -> None:
    # Mean outputs on a line. 2 and 3 join, then 1; from these on average 4 is nearer than 0 (4.43 and 4.67), but 0 is
    # nearer than 4 by the nearest (3 and 3.1) and by the farthest (6 and 6.1).
    experts = random_experts(num_experts=6)
    for expert, position in enumerate([0, 3, 5, 6, 9.1, 14]):
        experts.gate[expert], experts.up[expert] = experts.gate[0], experts.up[0]
        experts.down[expert] = experts.down[5] * position
    tokens = route(random_tokens().hidden, torch.randn(NUM_TOKENS, 6, generator=torch.Generator().manual_seed(7)))
    assert clusters(compress("hc-smoe", experts, tokens).experts) == [(0,), (1, 2, 3, 4), (5,)]


def test_sub_moe_finds_the_clusters_with_the_least_scatter() -> None:
    # Three of one kind and three of another, unlike enough that a bad start ends in a bad place.
    experts, tokens = random_experts(num_experts=6), random_tokens()
    for expert, noise in ((1, 1.4), (2, 1.1), (4, 0.3), (5, 1.1)):
        for name in MATRICES:
            weights = getattr(experts, name)
            weights[expert] = weights[expert // 3 * 3] + noise * weights[expert]
    tokens = route(tokens.hidden, torch.randn(NUM_TOKENS, 6, generator=torch.Generator().manual_seed(7)))
    outputs = torch.stack([experts.output(expert, tokens.hidden) for expert in range(6)])
    directions = outputs / outputs.norm(dim=2, keepdim=True)

    def scatter(labels: tuple[int, ...]) -> float:
        kinds = [directions[[expert for expert in range(6) if labels[expert] == label]] for label in set(labels)]
        return sum((kind - kind.mean(dim=0)).square().sum().item() for kind in kinds)

    best = min(itertools.product(range(3), repeat=6), key=scatter)
    found = clusters(compress("sub-moe", experts, tokens).experts)
    assert found == sorted(tuple(e for e in range(6) if best[e] == label) for label in set(best))


def test_the_seed_alone_decides_where_sub_moe_starts() -> None:
    experts = random_experts(num_experts=24)
    tokens = route(random_tokens().hidden, torch.randn(NUM_TOKENS, 24, generator=torch.Generator().manual_seed(8)))
    runs = [clusters(PEERS["sub-moe"].method(experts, tokens, random.Random(seed)).experts) for seed in (0, 0, 0, 0, 1)]
    assert runs[0] == runs[1] == runs[2] == runs[3] != runs[4]


@pytest.mark.parametrize("telling", MATRICES)
def test_m_smoe_undoes_a_permutation_of_neurons(telling: str) -> None:
    experts = random_experts()
    generator = torch.Generator().manual_seed(6)
    # Neurons differ in one of the three matrices only.
    for name in set(MATRICES) - {telling}:
        for weight in getattr(experts, name):
            weight[:] = weight[:, :1] if name == "down" else weight[:1]
    logits = torch.randn(NUM_TOKENS, NUM_EXPERTS, generator=generator)
    for first, second in PAIRS:
        order = torch.randperm(INTERMEDIATE_SIZE, generator=generator)
        experts.gate[second], experts.up[second] = experts.gate[first][order], experts.up[first][order]
        experts.down[second] = experts.down[first][:, order]
        logits[:, second] = logits[:, first] - 0.7
    tokens = route(random_tokens().hidden, logits)
    # Both of a pair are used, the first more than any second.
    counts = [len(tokens.of(expert)[0]) for expert in range(NUM_EXPERTS)]
    assert min(counts[first] for first, _ in PAIRS) > max(counts[second] for _, second in PAIRS) > 10
    merged = compress("m-smoe", experts, tokens).experts
    assert clusters(merged) == PAIRS
    for name in MATRICES:
        for first, _ in PAIRS:
            torch.testing.assert_close(getattr(merged, name)[first], getattr(experts, name)[first])
    assert error(merged, experts, tokens) < 1e-5


def test_m_smoe_compares_weights_where_the_router_says_nothing() -> None:
    # All experts are used alike, so that the lower half is dominant.
    pairs = [(0, 6), (1, 4), (2, 7), (3, 5)]
    experts = random_experts()
    for first, second in pairs:
        for name in MATRICES:
            getattr(experts, name)[second] = getattr(experts, name)[first] + 1e-4
    tokens = route(random_tokens().hidden, torch.zeros(NUM_TOKENS, NUM_EXPERTS), top_k=NUM_EXPERTS)
    merged = compress("m-smoe", experts, tokens).experts
    assert clusters(merged) == pairs
    for first, second in pairs:
        torch.testing.assert_close(merged.gate[first], (experts.gate[first] + experts.gate[second]) / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("slug", PEERS)
def test_every_method_survives_unused_experts_and_repeats_itself(slug: str, dtype: torch.dtype) -> None:
    random_layer = random_experts()
    before = ExpertWeights(
        *([weight.to(dtype) for weight in getattr(random_layer, name)] for name in MATRICES), activation=silu
    )
    tokens = random_tokens(unused=(0, 3, 5, 6, 7))
    experts = ExpertWeights(*([weight.clone() for weight in getattr(before, name)] for name in MATRICES), silu)
    first, second = (compress(slug, experts, tokens) for _ in range(2))
    assert first.dropped == second.dropped
    for name in MATRICES:
        for expert in range(NUM_EXPERTS):
            result, original = getattr(first.experts, name)[expert], getattr(before, name)[expert]
            assert torch.equal(result, getattr(second.experts, name)[expert])
            assert torch.equal(getattr(experts, name)[expert], original)
            assert result.isfinite().all()
            assert result.shape == original.shape
            assert result.dtype in (torch.float32, torch.bfloat16)
    assert error(first.experts, before, tokens) < 1.2
    if slug in ("hc-smoe", "m-smoe", "sub-moe"):
        assert len(clusters(first.experts)) == NUM_EXPERTS // 2


def test_rounding_and_the_bits_of_every_method() -> None:
    experts, tokens = random_experts(), random_tokens()
    for slug, rounding in (("fp8", round_to_fp8), ("int4", round_to_int4)):
        rounded = compress(slug, experts, tokens).experts
        for name in MATRICES:
            pairs = zip(getattr(rounded, name), getattr(experts, name), strict=True)
            assert all(torch.equal(result, rounding(weight)) for result, weight in pairs)
    bits = {slug: peer.bits for slug, peer in PEERS.items()}
    assert bits.pop("int4") == 4.125
    assert (bits.pop("wanda"), bits.pop("sparsegpt")) == (9, 9)
    assert set(bits.values()) == {8}
    assert [slug for slug, peer in PEERS.items() if not peer.needs_calibration] == [
        "magnitude",
        "random",
        "fp8",
        "int4",
    ]
