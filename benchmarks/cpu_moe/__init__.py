"""One MoE layer on a CPU: packed pairs beside the CPU kernels of vLLM."""
