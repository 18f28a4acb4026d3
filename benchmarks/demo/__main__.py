"""The demonstration behind `make demo`: build the reference model, pack it, code it, serve it three ways, ask it.

It uses the sparsely routed variant of the reference model: half of each layer's neurons sit in a shared expert that
packing leaves alone. The uncompressed model is served the same way as packed pairs and coded experts, one after the
other, for its speed and memory. The last line of output is one JSON object.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI

from benchmarks.demo.server import KV_CACHE_GIB, Server, serving
from benchmarks.reference_model.build import build
from benchmarks.reference_model.wheels import DEFAULT_CACHE, read_text
from vllm_puzzle.format import parse_expert_name
from vllm_puzzle.offline.checkpoints.checkpoint import Checkpoint

QUESTION = "What is the capital of France?"
MAX_TOKENS = 48
STREAMS = 5
# Of 2048 tokens each.
PAIRS_SEQUENCES = 8
# Codes take the text through the model two or three times, the source's and the coded one, so they get less of it.
CODES_SEQUENCES = 4


def _run(*arguments: str) -> None:
    print("$", " ".join(arguments), flush=True)
    subprocess.run([sys.executable, "-m", *arguments], check=True)


def _convert(source: Path, destination: Path, text: Path, sequences: int, *options: str) -> None:
    calibration = ("--calibration", str(text), "--calibration-sequences", str(sequences))
    _run("vllm_puzzle.convert", str(source), str(destination), *calibration, *options)


def _expert_bytes(checkpoint: Checkpoint) -> int:
    return sum(
        info.num_bytes
        for name, info in checkpoint.tensors.items()
        if parse_expert_name(name) is not None or ".mlp.experts." in name
    )


def ask(server: Server, model: Path) -> tuple[str, float]:
    """The chat's answer, and tokens per second after the first one, the median of STREAMS streamed completions."""
    client = OpenAI(base_url=server.base_url, api_key="none")
    chat = client.chat.completions.create(
        model=str(model),
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=MAX_TOKENS,
    )
    rates, text = [], ""
    for _ in range(STREAMS):
        stamps, text = [], ""
        for chunk in client.completions.create(
            model=str(model),
            prompt="The Moon is",
            temperature=0,
            max_tokens=MAX_TOKENS,
            stream=True,
            extra_body={"ignore_eos": True},
        ):
            stamps.append(time.monotonic())
            text += chunk.choices[0].text
        rates.append((len(stamps) - 1) / (stamps[-1] - stamps[0]))
    print(f"streamed: The Moon is{text}", flush=True)
    return chat.choices[0].message.content or "", statistics.median(rates)


@dataclass(frozen=True)
class Served:
    """What a checkpoint takes, on disk, in memory and to load, and how it replies."""

    expert_bytes: int
    checkpoint_bytes: int
    resident_bytes: int
    load_s: float
    tokens_per_s: float
    answer: str

    def to_json(self, prefix: str, suffix: str = "") -> dict[str, Any]:
        """What it takes, by field."""
        return {
            f"{prefix}expert_bytes{suffix}": self.expert_bytes,
            f"{prefix}checkpoint_bytes{suffix}": self.checkpoint_bytes,
            f"{prefix}resident_bytes{suffix}": self.resident_bytes,
            f"{prefix}load_s{suffix}": self.load_s,
        }


def serve_and_ask(model: Path, log: Path, *options: str) -> Served:
    """Serves a checkpoint with more `options` and asks it."""
    checkpoint = Checkpoint(model)
    with serving(model, log, "--max-model-len", "2048", *options) as server:
        answer, rate = ask(server, model)
        resident, load_s = server.resident_bytes(), server.load_seconds()
    return Served(_expert_bytes(checkpoint), checkpoint.num_bytes, resident, load_s, rate, answer)


def demo(work: Path, cache: Path, bits: float) -> dict[str, Any]:
    """Runs every step in the new folder `work`; returns what the last line of output says."""
    started = time.monotonic()
    cache.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True)
    source, text = work / "reference-moe", work / "c4.txt"
    packed, coded = work / "reference-moe-packed", work / "reference-moe-coded"
    print("building the sparsely routed reference model", flush=True)
    build("sparse", source, cache)
    text.write_text(read_text("c4", cache), encoding="utf-8")
    # The default rule of pairs, and a budget of bits over layers and experts, would take minutes more.
    _convert(source, packed, text, PAIRS_SEQUENCES, "--rule", "saliency")
    _convert(source, coded, text, CODES_SEQUENCES, "--bits", f"{bits:g}", "--even")
    plugin = ("--quantization", "puzzlemoe")
    before = serve_and_ask(source, work / "server-uncompressed.log")
    pairs = serve_and_ask(packed, work / "server.log", *plugin)
    codes = serve_and_ask(coded, work / "server-coded.log", *plugin)
    _print_table({"uncompressed": before, "packed pairs": pairs, f"{bits:g} bits": codes})
    return {
        **before.to_json("", "_before"),
        **pairs.to_json("", "_after"),
        "answer": pairs.answer,
        "answer_uncompressed": before.answer,
        "tokens_per_s_before": round(before.tokens_per_s, 2),
        "tokens_per_s": round(pairs.tokens_per_s, 2),
        "coded_bits": bits,
        **codes.to_json("coded_"),
        "coded_answer": codes.answer,
        "coded_tokens_per_s": round(codes.tokens_per_s, 2),
        "seconds": round(time.monotonic() - started, 1),
    }


def _print_table(served: Mapping[str, Served]) -> None:
    print(f"{'':14}" + "".join(f"{name:>16}" for name in served))
    for label, of in (
        ("expert bytes", lambda each: f"{each.expert_bytes:,}"),
        ("checkpoint", lambda each: f"{each.checkpoint_bytes:,}"),
        ("resident", lambda each: f"{each.resident_bytes:,}"),
        ("loading, s", lambda each: f"{each.load_s:.2f}"),
        ("tokens/s", lambda each: f"{each.tokens_per_s:.1f}"),
    ):
        print(f"{label:14}" + "".join(f"{of(each):>16}" for each in served.values()))
    print(f"vLLM's KV cache is {KV_CACHE_GIB} GiB of what is resident")
    print(f"question:      {QUESTION}")
    for name, each in served.items():
        print(f"{name + ':':14} {each.answer}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("demo"), help="folder to write; must not exist")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="where downloads are kept")
    parser.add_argument("--bits", type=float, default=4, help="bits a weight of the coded experts, 2 to 4 (default: 4)")
    arguments = parser.parse_args()
    if not 2 <= arguments.bits <= 4:
        parser.error(f"--bits {arguments.bits:g} is outside 2 to 4")
    if arguments.work.exists():
        parser.error(f"{arguments.work} exists already; remove it or give another --work")
    print(json.dumps(demo(arguments.work, arguments.cache, arguments.bits)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
