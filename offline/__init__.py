"""Source checkpoint in, packed checkpoint out; installed as `vllm_puzzle.offline`. Needs no vLLM."""
