"""Measure the perplexity of a causal language model over consecutive windows of a text.

python -m benchmarks.quality.perplexity MODEL_DIR
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.reference_model.wheels import DEFAULT_CACHE, ReferenceModelError, TextName, read_text


@torch.inference_mode()
def perplexity(model: PreTrainedModel, token_ids: Tensor, sequence_length: int) -> float:
    """exp of the mean negative log likelihood of token_ids: (num_tokens,), int64.

    The windows do not overlap and share no context, so the first token of each is given, not predicted.
    """
    if token_ids.ndim != 1 or len(token_ids) < 2 or sequence_length < 2:
        raise ValueError(
            "perplexity needs 1-D token_ids and windows of 2 tokens or more, "
            f"not shape {tuple(token_ids.shape)} in windows of {sequence_length}"
        )
    total, predicted = 0.0, 0
    for window in token_ids.to(model.device).split(sequence_length):
        if len(window) < 2:
            continue
        logits = model(window[None], use_cache=False).logits[0, :-1].float()
        total += cross_entropy(logits, window[1:], reduction="sum").item()
        predicted += len(window) - 1
    return math.exp(total / predicted)


def measure(folder: Path, text: TextName, tokens: int, sequence_length: int, cache: Path) -> dict[str, Any]:
    """The perplexity on the first `tokens` of a text, and what it was measured on."""
    if not (folder / "config.json").is_file():
        raise ReferenceModelError(f"{folder} holds no config.json; name the folder of a checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    token_ids = tokenizer(read_text(text, cache), return_tensors="pt", verbose=False).input_ids[0]
    if len(token_ids) < tokens:
        raise ReferenceModelError(f"{text} has {len(token_ids)} tokens, fewer than the {tokens} asked for")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    return {
        "model": str(folder),
        "text": text,
        "tokens": tokens,
        "sequence_length": sequence_length,
        "perplexity": perplexity(model, token_ids[:tokens], sequence_length),
    }


def _count(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{value} is too few: a token can be predicted only after another")
    return value


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.perplexity", description=__doc__.splitlines()[0]
    )
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="a transformers checkpoint")
    parser.add_argument("--text", choices=get_args(TextName), default="wiki")
    parser.add_argument("--tokens", type=_count, default=16384)
    parser.add_argument("--sequence-length", type=_count, default=2048)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="keeps the wheels (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here as well")
    args = parser.parse_args(argv)
    try:
        result = json.dumps(measure(args.model, args.text, args.tokens, args.sequence_length, args.cache))
        if args.json is not None:
            args.json.write_text(result + "\n", encoding="utf-8")
    except (ReferenceModelError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")
    print(result)


if __name__ == "__main__":
    main()
