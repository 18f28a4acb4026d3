"""What the quality benchmark says of a model, compared with slower ways to compute it."""

from dataclasses import replace

import pytest
import torch

from benchmarks.quality.methods import calibrate, compress_by_peer
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
    assert same.kl_divergence == same.kl_with_source_routing == 0
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


def test_held_routing_leaves_what_the_experts_lose(model: QualityModel, windows: torch.Tensor) -> None:
    """Experts that are changed where no token of the source goes lose nothing, until routers choose for themselves."""
    scorer = Scorer(model, windows)
    last = model.shape.moe_layers[-1]
    disturb(model, 0.5)
    disturbed = scorer.score()
    assert 0 < disturbed.kl_with_source_routing < disturbed.kl_divergence
    model.reset()
    # The last layer's router decides by what the layers before give, which is what it was.
    source = model.source(last)
    model.set_layer(last, source, dropped=[0])
    assert scorer.score().kl_with_source_routing is None
    model.reset()
    assert scorer.score().kl_with_source_routing == 0


def test_the_output_error_is_that_of_the_layers_output(model: QualityModel, windows: torch.Tensor) -> None:
    """To second order: here of errors in down alone, in which the output is linear."""
    logged = calibrate(model, windows)
    assert model.output_error(logged) == 0
    layer = model.shape.moe_layers[0]
    source, tokens = model.source(layer), logged[layer]
    changed = source.copy()
    changed.down[3] = source.down[3] * 0.5
    model.set_layer(layer, changed)
    lost = tokens.through(source) - tokens.through(model.experts(layer))
    energy = sum(
        float((source.output(expert, rows).float() * weights[:, None]).square().sum())
        for expert in range(source.num_experts)
        for _, weights, rows in tokens.parts(expert)
    )
    errors = model.layer_errors(logged)
    model.reset()
    # Moments are shrunk toward their diagonal and the layer's, by a fraction of the tokens here.
    assert errors[layer] == pytest.approx(float(lost.square().sum()) / energy, rel=0.3)
    assert [errors[other] for other in model.shape.moe_layers[1:]] == [0, 0]


def test_a_peer_says_what_it_takes(model: QualityModel, windows: torch.Tensor) -> None:
    logged = calibrate(model, windows)
    made = compress_by_peer(model, PEERS["reap"], windows, logged, 0)
    assert made.cost.bits == PEERS["reap"].bits
    assert made.layers.keys() == set(model.shape.moe_layers)
    made = compress_by_peer(model, PEERS["gptq-int4"], windows, logged, 0)
    # A scale of 16 bits a row: both matrices have fewer columns than a group.
    weights = 3 * 96 * 40
    assert made.cost.bits == pytest.approx(4 + 16 * (2 * 40 + 96) / weights)


def test_a_sequential_peer_sees_what_it_left(model: QualityModel, windows: torch.Tensor) -> None:
    """The first layer's inputs are the source model's, the next ones' are not."""
    logged = calibrate(model, windows)
    made = compress_by_peer(model, PEERS["wanda"], windows, logged, 0)
    blind = compress_by_peer(model, replace(PEERS["wanda"], sequential=False), windows, logged, 0)
    same = [
        all(map(torch.equal, made.layers[layer].experts.gate, blind.layers[layer].experts.gate))
        for layer in model.shape.moe_layers
    ]
    assert same == [True, False, False]
