"""What vLLM sees: registration, the quantization config, the MoE method and the loader of packed tensors."""

from .registration import register

__all__ = ["register"]
