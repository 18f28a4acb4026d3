"""Packed and unpacked agree: in vLLM, and with transformers' own models as a third witness.

In float32 all three compute the same sums in another order, so they agree to about 1e-5 and nothing can hide. In
bfloat16, the dtype people serve in, packed and unpacked are compared with float32: a sum in another order can round to
another number, and that can send a token to another expert. vLLM uses its vector kernels there, with AMX too.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.plugin.checkpoints import Checkpoints
from tests.plugin.engine import (
    ENGINE_OPTIONS,
    MAX_TOKENS,
    MORE_UNDECLARED,
    PROMPTS,
    SERVED,
    TEXTS,
    UNDECLARED,
    Answers,
    Greedy,
    assert_same_logprobs,
    generate,
    running,
    score,
    witness,
)
from tests.tiny import add_mtp_layer, build_tiny
from vllm_puzzle.cli import main
from vllm_puzzle.kernels.triton.target import INTERPRETED


@pytest.fixture
def vector_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    # A private name of torch's, which vLLM asks: it has no option for this.
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)


@pytest.mark.usefixtures("vector_kernels")
@pytest.mark.parametrize(
    "family",
    [
        "mixtral",
        "qwen2_moe",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3_moe", "olmoe", "llama4_text")),
    ],
)
def test_packed_is_as_near_to_float32_as_unpacked(family: str, checkpoints: Checkpoints, answers: Answers) -> None:
    """In bfloat16. Kernels of different machines round at different places, and a rounding can send a token elsewhere.

    So nothing is compared token by token: what rounding moves the log probabilities of the same texts by has to be of
    the size that it has with vLLM's own experts.
    """
    packed, unpacked = checkpoints.mixed(family)
    exact = answers.of(unpacked).scores
    scores = []
    for checkpoint in (unpacked, packed):
        with running(checkpoint, dtype="bfloat16") as llm:
            scores.append(score(llm, TEXTS))
    plain, ours = scores
    plain_error, our_error = (float((rounded - exact).square().mean().sqrt()) for rounded in (plain, ours))
    assert our_error <= 1.5 * plain_error, f"{our_error} beside {plain_error}"


@pytest.mark.parametrize("family", SERVED)
def test_three_witnesses_in_float32(family: str, checkpoints: Checkpoints, answers: Answers) -> None:
    """With pairs, codes and, where the model has a third layer with experts, plain ones."""
    packed, unpacked = checkpoints.mixed(family)
    from_packed, from_unpacked = (answers.of(checkpoint, family) for checkpoint in (packed, unpacked))
    model = AutoModelForCausalLM.from_pretrained(unpacked, dtype=torch.float32).eval()
    assert_same_logprobs(from_packed.greedy, from_unpacked.greedy, tolerance=1e-3)
    assert_same_logprobs(from_packed.greedy, witness(model, PROMPTS, from_packed.greedy), tolerance=1e-3)
    # Of so many tokens a router's near-tie may send one to another expert.
    elsewhere = (from_packed.scores - from_unpacked.scores).abs() > 1e-3
    assert elsewhere.sum() <= len(elsewhere) // 1000


@pytest.mark.parametrize(
    "family", [*UNDECLARED, *(pytest.param(family, marks=pytest.mark.slow) for family in MORE_UNDECLARED)]
)
def test_families_that_nobody_declared(family: str, checkpoints: Checkpoints, answers: Answers) -> None:
    """Transformers is no witness here: of some, vLLM computes something else on a CPU, packed or not."""
    packed, unpacked = checkpoints.mixed(family)
    from_packed, from_unpacked = (answers.of(checkpoint, family) for checkpoint in (packed, unpacked))
    assert_same_logprobs(from_packed.greedy, from_unpacked.greedy, tolerance=1e-3)
    elsewhere = (from_packed.scores - from_unpacked.scores).abs() > 1e-3
    assert elsewhere.sum() <= len(elsewhere) // 1000


def swap_gate_and_up(model: Any) -> None:
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            weight = layer.mlp.experts.gate_up_proj.data
            weight.copy_(torch.cat(weight.chunk(2, dim=1)[::-1], dim=1))


def swap_members(model: Any) -> None:
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            for weight in (layer.mlp.experts.gate_up_proj.data, layer.mlp.experts.down_proj.data):
                weight.copy_(weight[[1, 0, *range(2, len(weight))]])


def even_router_weights(model: Any) -> None:
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.register_forward_pre_hook(
                lambda module, args: (args[0], args[1], args[2].mean(dim=-1, keepdim=True).expand_as(args[2]))
            )


def silence_shared_experts(model: Any) -> None:
    for layer in model.model.layers:
        if hasattr(layer.mlp, "shared_expert"):
            layer.mlp.shared_expert.down_proj.weight.data.zero_()


@pytest.mark.parametrize("change", [swap_gate_and_up, swap_members, even_router_weights, silence_shared_experts])
def test_the_comparison_would_notice(change: Any, checkpoints: Checkpoints, answers: Answers) -> None:
    """Each thing that the witnesses prove right is made wrong in one of them, and must show in the first token."""
    packed, unpacked = checkpoints.mixed("qwen2_moe")
    from_packed = [Greedy(each.tokens[:1], each.logprobs[:1]) for each in answers.of(packed).greedy]
    model = AutoModelForCausalLM.from_pretrained(unpacked, dtype=torch.float32).eval()
    assert_same_logprobs(from_packed, witness(model, PROMPTS, from_packed), tolerance=1e-3)
    change(model)
    changed = witness(model, PROMPTS, from_packed)
    for prompt in range(len(PROMPTS)):
        with pytest.raises(AssertionError):
            assert_same_logprobs(from_packed[prompt : prompt + 1], changed[prompt : prompt + 1], tolerance=1e-3)


def test_it_runs_compiled(checkpoints: Checkpoints, answers: Answers) -> None:
    packed, _ = checkpoints.mixed("mixtral")
    with running(packed, enforce_eager=False, dtype="float32") as llm:
        compiled = generate(llm, PROMPTS, MAX_TOKENS)
    assert_same_logprobs(compiled, answers.of(packed).greedy, tolerance=1e-3)


def test_transformers_model_code_gives_the_same(checkpoints: Checkpoints, answers: Answers) -> None:
    """The config tells plain transformers to refuse; within vLLM its model code runs around our experts.

    In a process of its own, since vLLM then replaces parts of transformers for good.
    """
    packed, _ = checkpoints.mixed("qwen3_moe")
    program = (
        "import json, sys\nfrom pathlib import Path\n"
        "from tests.plugin.engine import PROMPTS, generate, running\n"
        "with running(Path(sys.argv[1]), dtype='float32', model_impl='transformers') as llm:\n"
        "    print('tokens', json.dumps([each.tokens for each in generate(llm, PROMPTS, int(sys.argv[2]))]))\n"
    )
    command = [sys.executable, "-c", program, str(packed), str(MAX_TOKENS)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [line for line in run.stdout.splitlines() if line.startswith("tokens ")]
    assert said, run.stderr[-2000:]
    assert json.loads(said[0].removeprefix("tokens ")) == [each.tokens for each in answers.of(packed).greedy]


def test_the_reference_engine_gives_the_same(
    checkpoints: Checkpoints, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, _ = checkpoints.mixed("qwen3_moe")
    chosen = answers.of(packed).greedy
    monkeypatch.setenv("VLLM_PUZZLE_ENGINE", "reference")
    with running(packed, dtype="float32") as llm:
        assert_same_logprobs(generate(llm, PROMPTS, MAX_TOKENS), chosen, tolerance=1e-3)


@pytest.mark.skipif(not INTERPRETED, reason="compiled kernels are served in tests/gpu")
def test_the_triton_engine_gives_the_same(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through vLLM, in Triton's interpreter."""
    packed, _ = checkpoints["qwen3_moe"]
    results = []
    for engine in ("reference", "triton"):
        monkeypatch.setenv("VLLM_PUZZLE_ENGINE", engine)
        # vLLM warms up with as many tokens as may come at once, and the interpreter is slow.
        with running(packed, dtype="float16", max_num_batched_tokens=16, max_model_len=16, max_num_seqs=2) as llm:
            # The first prompt is left out: two tokens tie there.
            results.append(generate(llm, [prompt[:6] for prompt in PROMPTS[1:3]], 4))
    assert_same_logprobs(*results, tolerance=1e-2)


@pytest.mark.parametrize(
    ("family", "layer"),
    [("deepseek_v3", "model.layers.3."), ("glm4_moe", "model.layers.3."), ("qwen3_next", "mtp.layers.0.")],
)
def test_layers_for_multi_token_prediction_draft(family: str, layer: str, tmp_path: Path) -> None:
    """They keep plain experts, which vLLM itself runs; what is drafted does not change what is said."""
    overrides = {"num_nextn_predict_layers": 1, **SERVED[family]}
    source, packed = build_tiny(family, tmp_path / "source", **overrides), tmp_path / "packed"
    add_mtp_layer(source, layer)
    assert main(["convert", str(source), str(packed)]) == 0
    said = []
    for drafting in ({}, {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}):
        with running(packed, dtype="float32", **ENGINE_OPTIONS.get(family, {}), **drafting) as llm:
            said.append([each.tokens for each in generate(llm, PROMPTS[:2], MAX_TOKENS)])
    assert said[0] == said[1]


def test_dummy_weights_need_no_checkpoint(checkpoints: Checkpoints, tmp_path: Path) -> None:
    packed, _ = checkpoints.mixed("mixtral")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((packed / name).read_text())
    with running(tmp_path, load_format="dummy") as llm:
        assert len(generate(llm, PROMPTS[:1], 4)[0].tokens) == 4


def test_fewer_pairs_run_too(tmp_path: Path) -> None:
    """25 %: slots of two members and of one in the same layer, and not as many in every layer."""
    source, packed, unpacked = tmp_path / "source", tmp_path / "packed", tmp_path / "unpacked"
    build_tiny("qwen3_moe", source)
    assert main(["convert", str(source), str(packed), "--compression", "25"]) == 0
    assert main(["unpack", str(packed), str(unpacked)]) == 0
    layers = json.loads((packed / "config.json").read_text())["quantization_config"]["layers"]
    pairs = [layer["pairs"] for layer in layers]
    assert sum(pairs) == 6
    assert any(0 < count < 4 for count in pairs)
    results = []
    for checkpoint in (packed, unpacked):
        with running(checkpoint, dtype="float32") as llm:
            results.append(generate(llm, PROMPTS, MAX_TOKENS))
    assert_same_logprobs(*results, tolerance=1e-3)
