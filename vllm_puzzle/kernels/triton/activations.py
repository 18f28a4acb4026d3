"""The activations of `vllm_puzzle.format.ACTIVATIONS`, in Triton."""

import triton
import triton.language as tl


@triton.jit
def activate(gate, NAME: tl.constexpr):
    """gate: float32 of any shape."""
    if NAME == "silu":
        return gate * tl.sigmoid(gate)
    elif NAME == "gelu":
        return 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
    else:
        tl.static_assert(NAME == "gelu_tanh")
        # (1 + tanh(y)) / 2 is sigmoid(2 y).
        return gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
