"""`python -m tests.plugin.ranks MODEL ARGUMENTS_JSON FILE`: greedy tokens from an engine on several ranks.

A program of its own, because vLLM starts one process a rank and each imports the main module.
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams

from tests.plugin.engine import PROMPTS

MAX_TOKENS = 32


def main() -> None:
    llm = LLM(sys.argv[1], enforce_eager=True, max_model_len=256, max_num_seqs=8, **json.loads(sys.argv[2]))
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    # Not to standard output, where every rank writes.
    Path(sys.argv[3]).write_text(json.dumps(tokens))


if __name__ == "__main__":
    main()
