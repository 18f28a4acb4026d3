"""One MoE layer on a GPU: packed pairs beside the Triton kernel of vLLM."""
