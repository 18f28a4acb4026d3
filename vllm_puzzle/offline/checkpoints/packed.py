"""A packed checkpoint as the offline tools read it: its schema, and that its tensors are those the schema implies."""

from pathlib import Path

from transformers.activations import ACT2FN

from vllm_puzzle.format import (
    QUANT_METHOD,
    FormatError,
    PuzzleMoEQuantizationConfig,
    check_packed_names,
    is_packed,
    parse_packed_name,
    word_layout,
)

from ..errors import CheckpointError
from ..merging.layer import Activation
from .checkpoint import Checkpoint
from .dense import build_model, check_dense
from .families import MoEShape, find_moe_shape


class PackedCheckpoint:
    """A checkpoint with `quant_method: puzzlemoe`.

    Raises:
        CheckpointError: it is not packed, breaks the schema, a packed tensor is missing, misshapen or unexpected, or
            another tensor that its model needs is missing or misshapen.
    """

    def __init__(self, path: Path) -> None:
        self.checkpoint = Checkpoint(path)
        raw_config, where = self.checkpoint.raw_config, path / "config.json"
        if not is_packed(raw_config):
            raise CheckpointError(
                f"{path} is not packed: its config.json has no quantization_config of quant_method {QUANT_METHOD}; "
                f"`vllm-puzzle convert` packs a checkpoint, `vllm-puzzle plan` says what that would save"
            )
        try:
            self.quantization = PuzzleMoEQuantizationConfig.parse(raw_config["quantization_config"], str(where))
            check_packed_names(self.checkpoint.tensors, self.quantization, str(path))
        except FormatError as error:
            raise CheckpointError(str(error)) from None
        self.layout = word_layout(self.quantization.bits)
        config = self.checkpoint.config
        self.shape: MoEShape = find_moe_shape(config, str(where))
        self._check_sizes(where)
        self.activation: Activation = ACT2FN[config.hidden_act]
        check_dense(
            self.checkpoint.shapes, build_model(config, where), self.shape, path, "copy or convert the checkpoint again"
        )
        self._slots = {
            self.shape.experts_prefix(slots.layer): (slots, slots.slot_of_expert())
            for slots in self.quantization.layers
        }
        self._check_tensors()

    def _check_sizes(self, where: Path) -> None:
        shape, quantization = self.shape, self.quantization
        stated = (shape.num_experts, shape.hidden_size, shape.intermediate_size)
        packed = (quantization.num_experts, quantization.hidden_size, quantization.intermediate_size)
        if stated != packed:
            raise CheckpointError(
                f"{where} is of {stated[0]} experts of 3 x {stated[2]} x {stated[1]} a layer, its quantization_config "
                f"of {packed[0]} of 3 x {packed[2]} x {packed[1]}; take the config.json that the converter wrote"
            )

    def _check_tensors(self) -> None:
        for name, info in self.checkpoint.tensors.items():
            parsed = parse_packed_name(name)
            if parsed is None:
                continue
            size, dtype = self.shape.projection_shape(parsed[2]), self.layout.safetensors_dtype
            if (info.shape, info.dtype) != (size, dtype):
                raise CheckpointError(
                    f"{self.checkpoint.path / info.shard}: {name} is {info.dtype} {list(info.shape)}, the schema "
                    f"implies {dtype} {list(size)}; convert the source again"
                )

    def members(self, name: str) -> list[str] | None:
        """The source names of the experts in a packed tensor, in member order; None for any other tensor."""
        parsed = parse_packed_name(name)
        if parsed is None:
            return None
        prefix, expert, projection = parsed
        slots, slot_of_expert = self._slots[prefix]
        code = int(slot_of_expert[expert])
        return [self.shape.expert_name(slots.layer, member, projection) for member in slots.members(code // 2)]
