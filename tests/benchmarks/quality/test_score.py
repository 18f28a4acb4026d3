"""What the quality benchmark says of a model, compared with slower ways to compute it."""

from dataclasses import replace

import pytest
import torch

from benchmarks.quality.methods import compress_by_peers
from benchmarks.quality.model import QualityModel
from benchmarks.quality.peers import PEERS
from benchmarks.quality.perplexity import perplexity
from benchmarks.quality.score import Scorer, continue_greedily, tokens_until_divergence
from tests.tiny import build_tiny
from vllm_puzzle.offline.merging.layer import ExpertWeights

LENGTH = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> QualityModel:
    return QualityModel(build_tiny("mixtral", tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(0, 256, (20, 24), generator=torch.Generator().manual_seed(1))


def disturb(model: QualityModel, amount: float) -> None:
    generator = torch.Generator().manual_seed(2)
    for layer in model.shape.moe_layers:
        source = model.source(layer)
        changed = [
            [m + amount * m.float().std() * torch.randn(m.shape, generator=generator) for m in matrices]
            for matrices in (source.gate, source.up, source.down)
        ]
        model.set_layer(layer, ExpertWeights(*changed, source.activation))


def test_a_score_is_of_the_model_as_it_is_now(model: QualityModel, windows: torch.Tensor) -> None:
    scorer = Scorer(model, windows)
    same = scorer.score()
    assert same.perplexity == pytest.approx(perplexity(model.causal, windows.flatten(), windows.shape[1]), rel=2e-2)
    assert same.kl_divergence == 0
    assert same.top1_agreement == 1
    with torch.inference_mode():
        wanted = model.causal(windows).logits[:, :-1].float().log_softmax(-1)
        disturb(model, 0.5)
        got = model.causal(windows).logits[:, :-1].float().log_softmax(-1)
    score = scorer.score()
    assert score.perplexity == pytest.approx(perplexity(model.causal, windows.flatten(), windows.shape[1]), rel=2e-2)
    assert score.kl_divergence == pytest.approx(float((wanted.exp() * (wanted - got)).sum(-1).mean()), rel=0.05)
    assert score.top1_agreement == pytest.approx(float((wanted.argmax(-1) == got.argmax(-1)).float().mean()), abs=0.02)
    model.reset()
    assert scorer.score() == same


def test_divergence_is_where_the_greedy_continuation_leaves(model: QualityModel, windows: torch.Tensor) -> None:
    prompts = windows[:, :10]
    wanted = continue_greedily(model, prompts, LENGTH)
    assert tokens_until_divergence(model, prompts, wanted) == [LENGTH] * len(prompts)
    with torch.inference_mode():
        token_by_token = model.causal.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=4, min_new_tokens=4, do_sample=False
        )
    # On a tie of two logits in bfloat16 the two ways may choose differently.
    assert float((token_by_token[:, 10:] == wanted[:, :4]).float().mean()) > 0.7
    disturb(model, 0.2)
    left = continue_greedily(model, prompts, LENGTH) != wanted
    found = tokens_until_divergence(model, prompts, wanted)
    model.reset()
    assert found == [row.index(True) if any(row) else LENGTH for row in left.tolist()]
    assert 0 < sum(found) < 0.9 * wanted.numel()


def test_peers_that_share_the_calibration_see_what_each_sees_alone(model: QualityModel, windows: torch.Tensor) -> None:
    peers = [PEERS[slug] for slug in ("reap", "hc-smoe")]
    together = compress_by_peers(model, peers, windows, 0)
    for peer, shared in zip(peers, together, strict=True):
        (alone,) = compress_by_peers(model, [peer], windows, 0)
        assert shared.layers.keys() == set(model.shape.moe_layers)
        assert shared.cost.bits == peer.bits
        for layer, compressed in shared.layers.items():
            assert compressed.dropped == alone.layers[layer].dropped
            for mine, its in zip(compressed.experts.gate, alone.layers[layer].experts.gate, strict=True):
                assert torch.equal(mine, its)


def test_a_sequential_peer_sees_what_it_left(model: QualityModel, windows: torch.Tensor) -> None:
    """The first layer's inputs are the source model's, the next ones' are not."""
    (made,) = compress_by_peers(model, [PEERS["wanda"]], windows, 0)
    (blind,) = compress_by_peers(model, [replace(PEERS["wanda"], sequential=False)], windows, 0)
    same = [
        all(map(torch.equal, made.layers[layer].experts.gate, blind.layers[layer].experts.gate))
        for layer in model.shape.moe_layers
    ]
    assert same == [True, False, False]
