"""Source checkpoint in, packed checkpoint out. Needs no vLLM."""
