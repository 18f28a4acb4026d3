"""The reference model: what it equals, and that vLLM runs it packed as it runs it unpacked."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.quality.perplexity import perplexity
from benchmarks.reference_model.build import build
from benchmarks.reference_model.wheels import DEFAULT_CACHE, ReferenceModelError, load_dense, read_text
from tests.plugin.checkpoints import mix, pack_and_unpack
from tests.plugin.engine import (
    assert_same_logprobs,
    generate,
    running,
    score,
    witness,
)

QUESTIONS = [
    "What is the capital of France?",
    "Name three fruits.",
    "Why is the sky blue?",
    "What is the Moon?",
    "Write a short story about a cat.",
    "How do I boil an egg?",
    "Who was Isaac Newton?",
    "List the colours of the rainbow.",
]
MAX_TOKENS = 32


@pytest.fixture(scope="session")
def cache() -> Path:
    DEFAULT_CACHE.mkdir(parents=True, exist_ok=True)
    return DEFAULT_CACHE


@pytest.fixture(scope="session")
def all_active(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("all-active") / "source"
    build("all-active", path, cache)
    return path


@pytest.fixture(scope="session")
def sparse(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sparse") / "source"
    build("sparse", path, cache)
    return path


@pytest.fixture(scope="session", params=["all_active", pytest.param("sparse", marks=pytest.mark.slow)])
def twins(request: pytest.FixtureRequest, cache: Path) -> tuple[Path, Path]:
    """(packed, unpacked), with packed pairs and codes in turns."""
    reference = request.getfixturevalue(request.param)
    # About two sequences: this is about the same weights on both sides, not about good ones.
    packed, unpacked = pack_and_unpack(reference, reference.parent, read_text("c4", cache)[:18000])
    mix(reference, packed, unpacked, ("pairs", "even", "pairs", "uneven") * 8)
    return packed, unpacked


def prompts(path: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(path)
    return [
        tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True).input_ids
        for question in QUESTIONS
    ]


def test_all_active_equals_the_dense_model(all_active: Path, cache: Path) -> None:
    dense, tokenizer = load_dense(cache)
    ids = tokenizer(read_text("wiki", cache)[:2000], return_tensors="pt").input_ids
    split = AutoModelForCausalLM.from_pretrained(all_active, dtype=torch.float32)
    with torch.inference_mode():
        expected, got = dense.float()(ids).logits, split(ids).logits
    # Logits reach 30; float32 sums in another order.
    assert (got - expected).abs().max() < 1e-3
    assert perplexity(split, ids[0], 128) == pytest.approx(perplexity(dense, ids[0], 128), rel=1e-4)


def test_packed_and_unpacked_agree(twins: tuple[Path, Path], cache: Path) -> None:
    """Token for token in float32; in bfloat16 the two differ no more than rounding makes either differ from float32.

    Thirty layers carry one sum that was rounded the other way into every later one, so in bfloat16 two right answers
    differ by tenths in log probability, and a bound on that difference alone would say nothing.
    """
    packed, unpacked = twins
    ids = prompts(packed)
    text = AutoTokenizer.from_pretrained(packed)(read_text("wiki", cache)[:6000]).input_ids
    windows = [text[start : start + 250] for start in range(0, 1000, 250)]
    with running(packed, dtype="float32") as llm:
        from_packed = generate(llm, ids, MAX_TOKENS)
        exact_packed = score(llm, windows)
    with running(unpacked, dtype="float32") as llm:
        from_unpacked = generate(llm, ids, MAX_TOKENS)
        exact_unpacked = score(llm, windows)
    model = AutoModelForCausalLM.from_pretrained(unpacked, dtype=torch.float32).eval()
    assert_same_logprobs(from_packed, from_unpacked, tolerance=1e-3)
    assert_same_logprobs(from_packed, witness(model, ids, from_packed), tolerance=1e-3)
    assert (exact_packed - exact_unpacked).abs().max() < 1e-3

    with running(packed) as llm:
        rounded_packed = score(llm, windows)
    with running(unpacked) as llm:
        rounded_unpacked = score(llm, windows)
    rounding = (rounded_unpacked - exact_unpacked).abs().mean()
    assert (rounded_packed - exact_packed).abs().mean() <= 1.25 * rounding
    assert (rounded_packed - rounded_unpacked).abs().mean() <= 1.5 * rounding


def test_it_does_not_overwrite(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ReferenceModelError, match="exists already"):
        build("all-active", tmp_path, cache)
