"""The demonstration behind `make demo`: build the reference model, pack it, serve it, ask it.

It uses the sparsely routed variant of the reference model: half of each layer's neurons sit in a shared expert that
packing leaves alone, so its replies stay sensible at 50 %. The all-active variant, whose whole FFN is merged, soon
repeats itself. The uncompressed model is served the same way, one after the other, for its speed and memory.
The last line of output is one JSON object.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from openai import OpenAI

from benchmarks.demo.server import KV_CACHE_GIB, Server, serving
from benchmarks.reference_model.build import build
from benchmarks.reference_model.wheels import DEFAULT_CACHE, read_text
from vllm_puzzle.format import parse_packed_name
from vllm_puzzle.offline.checkpoints.checkpoint import Checkpoint

QUESTION = "What is the capital of France?"
MAX_TOKENS = 48
STREAMS = 5
CALIBRATION_SEQUENCES = 8


def _run(*arguments: str) -> None:
    print("$", " ".join(arguments), flush=True)
    subprocess.run([sys.executable, "-m", *arguments], check=True)


def _expert_bytes(checkpoint: Checkpoint) -> int:
    return sum(
        info.num_bytes
        for name, info in checkpoint.tensors.items()
        if parse_packed_name(name) is not None or ".mlp.experts." in name
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


def demo(work: Path, cache: Path) -> dict[str, Any]:
    """Runs every step in the new folder `work`; returns what the last line of output says."""
    started = time.monotonic()
    cache.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True)
    source, packed, text = work / "reference-moe", work / "reference-moe-packed", work / "c4.txt"
    print("building the sparsely routed reference model", flush=True)
    build("sparse", source, cache)
    text.write_text(read_text("c4", cache), encoding="utf-8")
    # The default rule would take minutes more to answer the same question.
    options = ("--calibration", str(text), "--calibration-sequences", str(CALIBRATION_SEQUENCES), "--rule", "saliency")
    _run("vllm_puzzle.convert", str(source), str(packed), *options)
    before, after = Checkpoint(source), Checkpoint(packed)
    with serving(source, work / "server-uncompressed.log", "--max-model-len", "2048") as server:
        uncompressed, rate_before = ask(server, source)
        resident_before = server.resident_bytes()
    with serving(packed, work / "server.log", "--quantization", "puzzlemoe", "--max-model-len", "2048") as server:
        answer, rate = ask(server, packed)
        resident = server.resident_bytes()
    print(f"experts     {_expert_bytes(before):>12,} -> {_expert_bytes(after):>12,} bytes")
    print(f"checkpoint  {before.num_bytes:>12,} -> {after.num_bytes:>12,} bytes")
    print(f"resident    {resident_before:>12,} -> {resident:>12,} bytes, of which vLLM's KV cache {KV_CACHE_GIB} GiB")
    print(f"tokens/s    {rate_before:>12.1f} -> {rate:>12.1f}")
    print(f"question:      {QUESTION}\nuncompressed:  {uncompressed}\npacked pairs:  {answer}")
    return {
        "expert_bytes_before": _expert_bytes(before),
        "expert_bytes_after": _expert_bytes(after),
        "checkpoint_bytes_before": before.num_bytes,
        "checkpoint_bytes_after": after.num_bytes,
        "answer": answer,
        "answer_uncompressed": uncompressed,
        "resident_bytes_before": resident_before,
        "resident_bytes_after": resident,
        "tokens_per_s_before": round(rate_before, 2),
        "tokens_per_s": round(rate, 2),
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("demo"), help="folder to write; must not exist")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="where downloads are kept")
    arguments = parser.parse_args()
    if arguments.work.exists():
        parser.error(f"{arguments.work} exists already; remove it or give another --work")
    print(json.dumps(demo(arguments.work, arguments.cache)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
