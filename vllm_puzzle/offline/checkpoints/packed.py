"""A packed checkpoint as the offline tools read it: its schema, and that its tensors are those the schema implies."""

from pathlib import Path

import torch
from transformers.activations import ACT2FN

from vllm_puzzle.format import (
    QUANT_METHOD,
    FormatError,
    PuzzleMoEQuantizationConfig,
    check_codebook,
    check_packed_names,
    is_packed,
    parse_expert_name,
    unpack,
    word_layout,
)

from ..errors import CheckpointError
from ..merging.layer import Activation
from .checkpoint import Checkpoint
from .coded import StoredMatrix, lay_out_coded, stored_matrix
from .dense import build_model, check_dense
from .shape import MoEShape, find_moe_shape


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
        self.shape: MoEShape = find_moe_shape(config, str(where), self.checkpoint.shapes, self.quantization)
        self._check_sizes(where)
        self.activation: Activation = ACT2FN[self.shape.hidden_act]
        check_dense(
            self.checkpoint.shapes, build_model(config, where), self.shape, path, "copy or convert the checkpoint again"
        )
        self._slots = {
            self.shape.experts_prefix(slots.layer): (slots, slots.slot_of_expert())
            for slots in self.quantization.layers
        }
        self._coded = {self.shape.experts_prefix(codes.layer): codes for codes in self.quantization.coded_layers}
        self._check_layers(where)
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

    def _check_layers(self, where: Path) -> None:
        quantization = self.quantization
        stated = {slots.layer for slots in quantization.layers} | set(quantization.plain_layers)
        stated |= {codes.layer for codes in quantization.coded_layers}
        if stated != set(self.shape.moe_layers):
            raise CheckpointError(
                f"{where} has experts in the layers {list(self.shape.moe_layers)}, its quantization_config lists "
                f"{sorted(stated)}; take the config.json that the converter wrote"
            )

    def _check_tensors(self) -> None:
        coded = {
            tensor.name: (tensor.dtype, tensor.shape)
            for codes in self.quantization.coded_layers
            for expert in range(codes.num_experts)
            for tensor in lay_out_coded(self.shape, codes, expert)
        }
        for name, info in self.checkpoint.tensors.items():
            parsed = parse_expert_name(name)
            if parsed is None:
                continue
            pair = (self.layout.safetensors_dtype, self.shape.projection_shape(parsed.projection))
            dtype, size = coded.get(name, pair)
            if (info.shape, info.dtype) != (size, dtype):
                raise CheckpointError(
                    f"{self.checkpoint.path / info.shard}: {name} is {info.dtype} {list(info.shape)}, the schema "
                    f"implies {dtype} {list(size)}; convert the source again"
                )

    def members(self, name: str) -> list[str] | None:
        """The source names of the matrices that a packed tensor stands for, in order; None for any other tensor.

        Those of a slot are of its members; those of a codebook and of scales are told with the codes.
        """
        parsed = parse_expert_name(name)
        if parsed is None:
            return None
        if coded := self.coded(name):
            return list(coded.sources) if name == coded.names[0] else []
        slots, slot_of_expert = self._slots[parsed.prefix]
        code = int(slot_of_expert[parsed.expert])
        return [self.shape.expert_name(slots.layer, member, parsed.projection) for member in slots.members(code // 2)]

    def coded(self, name: str) -> StoredMatrix | None:
        """The coded matrix that a tensor is a part of, None for any other tensor."""
        parsed = parse_expert_name(name)
        codes = None if parsed is None else self._coded.get(parsed.prefix)
        return None if parsed is None or codes is None else stored_matrix(self.shape, codes, parsed)

    def read_coded(self, matrix: StoredMatrix) -> dict[str, torch.Tensor]:
        """The tensors of a coded matrix; raises CheckpointError for points or scales that no converter writes."""
        tensors = self.checkpoint.read(matrix.names)
        try:
            check_codebook(matrix.codebook(tensors), matrix.scales(tensors), matrix.names[1])
        except FormatError as error:
            raise CheckpointError(f"{self.checkpoint.path}: {error}; convert the source again") from None
        return tensors

    def decode(self, name: str) -> dict[str, torch.Tensor]:
        """The matrices that a packed tensor stands for, bfloat16, by their source names; see `members`."""
        names = self.members(name) or []
        if names and (coded := self.coded(name)):
            matrices = [matrix.bfloat16() for matrix in coded.decoded(self.read_coded(coded))]
        else:
            words = self.checkpoint.read([name])[name] if names else torch.empty(0)
            matrices = [unpack(words, member, self.layout) for member in range(len(names))]
        return dict(zip(names, matrices, strict=True))
