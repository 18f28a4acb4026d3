"""What of vLLM its fused_moe.py needs, and nothing else; `benchmarks.gpu_session.peer` gathers them."""
