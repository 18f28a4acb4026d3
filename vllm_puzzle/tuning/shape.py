"""The sizes that tiles are tuned for, given or read from a packed checkpoint."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_puzzle.kernels.triton.configs import CallSizes


@dataclass(frozen=True)
class LayerShape:
    """The routed experts of one layer, all of them in pairs; `name` is for people."""

    name: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    top_k: int

    @property
    def num_slots(self) -> int:
        """The slots that hold the experts; of an odd number of experts one is alone."""
        return -(-self.num_experts // 2)

    @property
    def expert_elements(self) -> int:
        """The weights of one expert, gate, up and down, as many as a slot has words."""
        return 3 * self.hidden_size * self.intermediate_size

    def call_sizes(self, num_tokens: int) -> "CallSizes":
        """The sizes of a call with so many tokens."""
        from vllm_puzzle.kernels.triton.configs import CallSizes

        return CallSizes(
            self.num_experts, self.num_slots, self.hidden_size, self.intermediate_size, self.top_k, num_tokens
        )


def read_shape(packed: Path) -> tuple[LayerShape, str]:
    """The shape of a packed checkpoint's layers, and the dtype of its activations: bfloat16 or float16.

    Raises:
        FormatError: config.json cannot be read, is not that of a packed checkpoint, or does not say how many experts a
            token has.
    """
    from transformers import AutoConfig

    from vllm_puzzle.format import FormatError, PuzzleMoEQuantizationConfig, is_packed

    path = packed / "config.json"
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}; give the folder that convert wrote") from None
    except ValueError as error:
        raise FormatError(f"{path} is not JSON: {error}; copy or convert the checkpoint again") from None
    if not is_packed(config):
        raise FormatError(f"{path} is not that of a packed checkpoint; give the folder that convert wrote")
    sizes = PuzzleMoEQuantizationConfig.parse(config["quantization_config"], f"{path}: quantization_config")
    try:
        text = AutoConfig.from_pretrained(packed, trust_remote_code=False, local_files_only=True).get_text_config()
        top_k = int(text.num_experts_per_tok)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise FormatError(
            f"{path} does not say how many experts a token has ({' '.join(str(error).split())}); give the four sizes "
            f"in place of the checkpoint"
        ) from None
    dtype = str(getattr(text, "dtype", None)).removeprefix("torch.")
    shape = LayerShape(packed.name, sizes.num_experts, sizes.hidden_size, sizes.intermediate_size, top_k)
    return shape, dtype if dtype == "float16" else "bfloat16"
