"""Layers of published models, from their config.json, that the benchmarks of one layer measure."""

from vllm_puzzle.tuning.shape import LayerShape

MIXTRAL_8X7B = LayerShape("Mixtral-8x7B", num_experts=8, hidden_size=4096, intermediate_size=14336, top_k=2)
QWEN3_30B_A3B = LayerShape("Qwen3-30B-A3B", num_experts=128, hidden_size=2048, intermediate_size=768, top_k=8)
DEEPSEEK_V3 = LayerShape("DeepSeek-V3", num_experts=256, hidden_size=7168, intermediate_size=2048, top_k=8)
# One of four expert-parallel ranks.
DEEPSEEK_V3_QUARTER = LayerShape("DeepSeek-V3 / 4", num_experts=64, hidden_size=7168, intermediate_size=2048, top_k=8)
DEEPSEEK_V2_LITE = LayerShape("DeepSeek-V2-Lite", num_experts=64, hidden_size=2048, intermediate_size=1408, top_k=6)
# Mixtral-8x7B's experts would take minutes a row on a CPU.
MIXTRAL_LIKE = LayerShape("Mixtral-like", num_experts=8, hidden_size=2048, intermediate_size=4096, top_k=2)

CPU_SHAPES = (QWEN3_30B_A3B, MIXTRAL_LIKE, DEEPSEEK_V2_LITE)
GPU_SHAPES = (MIXTRAL_8X7B, QWEN3_30B_A3B, DEEPSEEK_V3)
