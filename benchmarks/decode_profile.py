"""Where the time of a decode step goes in vLLM on a CPU: the same model packed and unpacked.

    python -m benchmarks.decode_profile PACKED UNPACKED

One sequence, greedy, in an engine inside this process. Prints, for each checkpoint, what starting the engine took, a
step's wall time without a profiler, and from a second, profiled run the operators that took most of the CPU's time.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

NUM_TOKENS = 128
PROFILED_TOKENS = 32
NUM_OPERATORS = 8
PROMPT = list(range(100, 110))


def _decode(llm: Any, num_tokens: int) -> float:
    """Seconds for one prompt and `num_tokens` tokens after it."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    started = time.perf_counter()
    llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)
    return time.perf_counter() - started


def profile_decode(model: Path) -> None:
    """Prints the figures of one checkpoint."""
    from torch.profiler import ProfilerActivity, profile
    from vllm import LLM

    started = time.perf_counter()
    llm = LLM(str(model), max_model_len=512, max_num_seqs=1, enforce_eager=True, disable_log_stats=True)
    start_s = time.perf_counter() - started
    _decode(llm, NUM_TOKENS)
    step_ms = min(_decode(llm, NUM_TOKENS) for _ in range(3)) / NUM_TOKENS * 1e3
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        profiled_ms = _decode(llm, PROFILED_TOKENS) / PROFILED_TOKENS * 1e3
    operators = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    print(f"\n{model}: engine started in {start_s:.1f} s, {step_ms:.2f} ms a step ({profiled_ms:.2f} profiled)")
    print(f"{'operator':<44}{'calls a step':>14}{'us a call':>12}{'ms a step':>12}{'share':>8}")
    rest = profiled_ms
    for event in operators[:NUM_OPERATORS]:
        step_share = event.self_cpu_time_total / 1e3 / PROFILED_TOKENS
        rest -= step_share
        print(
            f"{event.key:<44}{event.count / PROFILED_TOKENS:>14.1f}{event.self_cpu_time_total / event.count:>12.1f}"
            f"{step_share:>12.2f}{step_share / profiled_ms:>8.1%}"
        )
    print(f"{'everything else, vLLM scheduling included':<44}{'':>26}{rest:>12.2f}{rest / profiled_ms:>8.1%}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode_profile")
    parser.add_argument("packed", type=Path, metavar="PACKED")
    parser.add_argument("unpacked", type=Path, metavar="UNPACKED")
    arguments = parser.parse_args()
    # The engine must run in this process to be profiled.
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR")
    for model in (arguments.packed, arguments.unpacked):
        profile_decode(model)
    return 0


if __name__ == "__main__":
    sys.exit(main())
