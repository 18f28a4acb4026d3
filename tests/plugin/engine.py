"""In-process vLLM engines for tests, and how their greedy outputs are compared."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

NUM_CANDIDATES = 5

MAX_TOKENS = 64

# Of bytes, which are the tokens of tiny models; of different lengths.
PROMPTS = [[(7 * i * i + j * (i + 3) + 11) % 256 for j in range(5 + 3 * i)] for i in range(8)]
TEXTS = [[(11 * i * i + j * (2 * i + 5) + j * j * j) % 256 for j in range(200)] for i in range(8)]

_ATTENTION_ALONE = {"layer_types": ["full_attention"] * 3}
# Latent attention decodes on a CPU at the sizes of the published models alone.
_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}

# The families that vLLM 0.32 serves on a CPU, and how their tiny models must differ for that. Recurrent layers have no
# kernels there, the bias of Ernie's router is ignored, and MiniMax-M2's router fails.
SERVED: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "olmoe": {},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "glm4_moe": {},
    "phimoe": {},
    "ernie4_5_moe": {"router_bias": False},
    "granitemoe": {},
    "granitemoehybrid": _ATTENTION_ALONE,
    "llama4_text": {},
    "qwen3_next": _ATTENTION_ALONE,
}

# Families that are not declared, which it serves too: fused experts with a multiplier, and experts named w1, w3, w2.
UNDECLARED: dict[str, dict[str, Any]] = {
    "granitemoe_swa": {},
    "lfm2_moe": _ATTENTION_ALONE,
}
# They repeat what those show, the last two by vLLM's backend of transformers' models.
MORE_UNDECLARED: dict[str, dict[str, Any]] = {
    "exaone_moe": {},
    "cohere2_moe": {},
    "glm4_moe_lite": {**_LATENT, "head_dim": 64},
    "hunyuan_v1_moe": {},
    "mellum": {},
}

# vLLM 0.32's rotary kernel for CPUs gives DeepSeek wrong numbers, packed or not; torch's own operations do not.
_TORCH_ROTARY = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
ENGINE_OPTIONS: dict[str, dict[str, Any]] = dict.fromkeys(
    ("deepseek_v2", "deepseek_v3", "glm4_moe_lite"), _TORCH_ROTARY
)


@dataclass(frozen=True)
class Greedy:
    """A greedy continuation: its tokens, and per position the log probabilities of the likeliest ones."""

    tokens: list[int]
    logprobs: list[dict[int, float]]


@contextmanager
def running(model: Path, **options: Any) -> Iterator[LLM]:
    """An engine in this process, gone when the block ends."""
    defaults = {"enforce_eager": True, "max_model_len": 256, "max_num_seqs": 8, "disable_log_stats": True}
    llm = LLM(str(model), **{**defaults, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def generate(llm: LLM, prompts: list[list[int]], max_tokens: int, adapter: LoRARequest | None = None) -> list[Greedy]:
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=NUM_CANDIDATES, ignore_eos=True)
    texts = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(texts, sampling, use_tqdm=False, lora_request=adapter)
    return [
        Greedy(
            list(output.outputs[0].token_ids),
            [{token: entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs],
        )
        for output in outputs
    ]


def score(llm: LLM, prompts: list[list[int]]) -> torch.Tensor:
    """The log probability of every token of the prompts but the first of each, float64 (num_tokens,)."""
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0),
        use_tqdm=False,
    )
    return torch.tensor(
        [
            step[token].logprob
            for prompt, output in zip(prompts, outputs, strict=True)
            for token, step in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
        ],
        dtype=torch.float64,
    )


@dataclass(frozen=True)
class Answer:
    """What a checkpoint says in float32: after PROMPTS, MAX_TOKENS each, and of TEXTS, as `score` gives it."""

    greedy: list[Greedy]
    scores: torch.Tensor


class Answers:
    """The answers of checkpoints on the engine that vLLM's plugin chooses by itself.

    Each is asked once: to start an engine takes seconds, and several tests compare with the same one.
    """

    def __init__(self) -> None:
        self._given: dict[Path, Answer] = {}

    def of(self, checkpoint: Path, family: str = "") -> Answer:
        """`family` is the one whose engines need options of their own."""
        if checkpoint not in self._given:
            with running(checkpoint, dtype="float32", **ENGINE_OPTIONS.get(family, {})) as llm:
                self._given[checkpoint] = Answer(generate(llm, PROMPTS, MAX_TOKENS), score(llm, TEXTS))
        return self._given[checkpoint]


@torch.inference_mode()
def witness(model: Any, prompts: list[list[int]], continuations: list[Greedy]) -> list[Greedy]:
    """What a transformers model would have chosen at every position of the same texts."""
    results = []
    for prompt, continuation in zip(prompts, continuations, strict=True):
        text = torch.tensor([prompt + continuation.tokens])
        logits = model(text).logits[0, len(prompt) - 1 : -1].float()
        best = logits.log_softmax(-1).topk(NUM_CANDIDATES)
        likeliest = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        results.append(Greedy(best.indices[:, 0].tolist(), [dict(zip(*step, strict=True)) for step in likeliest]))
    return results


def assert_same_tokens(left: list[Greedy], right: list[Greedy], tolerance: float = 0.05) -> None:
    """Both chose the same tokens, up to where a near-tie flipped one.

    There both give each of the two tokens the same log probability within `tolerance`; what follows continues from
    different texts and is not compared.
    """
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        differing = [i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)) if x != y]
        if not differing:
            continue
        position = differing[0]
        for token in (a.tokens[position], b.tokens[position]):
            where = f"prompt {index}, position {position}, token {token}"
            assert token in a.logprobs[position], f"{where}: not among the likeliest on the left"
            assert token in b.logprobs[position], f"{where}: not among the likeliest on the right"
            difference = abs(a.logprobs[position][token] - b.logprobs[position][token])
            assert difference <= tolerance, f"{where}: log probabilities differ by {difference}"


def assert_same_logprobs(left: list[Greedy], right: list[Greedy], tolerance: float) -> None:
    """Both chose the same tokens, and at every position gave them the same log probability within `tolerance`."""
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        assert a.tokens == b.tokens, f"prompt {index}: other tokens"
        for position, token in enumerate(a.tokens):
            difference = abs(a.logprobs[position][token] - b.logprobs[position][token])
            assert difference <= tolerance, f"prompt {index}, position {position}: {difference}"
