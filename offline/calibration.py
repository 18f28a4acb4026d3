"""Calibration: real text through the real model, one decoder layer in memory at a time."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.activations import ACT2FN

from vllm_puzzle.format import Calibration

from .checkpoint import Checkpoint
from .errors import CheckpointError
from .families import MoEShape

# PuzzleMoE, section 4: 128 sequences of 2048 tokens.
SEQUENCE_LENGTH = 2048
DEFAULT_SEQUENCES = 128


@dataclass(frozen=True)
class ExpertNorms:
    """L2 norms of each input channel over the tokens that were routed to an expert, float32.

    `hidden` (num_experts, hidden_size) is for gate and up, `intermediate` (num_experts, intermediate_size) for down;
    `tokens` (num_experts,) counts the tokens, int64.
    """

    hidden: torch.Tensor
    intermediate: torch.Tensor
    tokens: torch.Tensor

    @classmethod
    def uniform(cls, shape: MoEShape) -> "ExpertNorms":
        """All ones: saliency is the weight's magnitude alone."""
        return cls(
            torch.ones(shape.num_experts, shape.hidden_size),
            torch.ones(shape.num_experts, shape.intermediate_size),
            torch.zeros(shape.num_experts, dtype=torch.int64),
        )


def read_calibration(
    path: Path, checkpoint: Checkpoint, config: Any, sequences: int
) -> tuple[torch.Tensor, Calibration]:
    """Token ids (num_sequences, sequence_length), int64, from a UTF-8 text file, and what to record about them.

    Text shorter than one sequence is one shorter sequence.
    """
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"calibration text {path} does not exist; give a UTF-8 file or 'none'") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"calibration text {path} cannot be read as UTF-8: {error}") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{checkpoint.path} has no tokenizer that transformers can read: {reason}") from None
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    length = min(SEQUENCE_LENGTH, config.max_position_embeddings, len(ids))
    if length < 2:
        raise CheckpointError(f"calibration text {path} has {len(ids)} tokens; give some pages of text")
    count = min(sequences, len(ids) // length)
    provenance = Calibration(
        source=path.name, sha256=hashlib.sha256(raw).hexdigest(), sequences=count, sequence_length=length
    )
    return ids[: count * length].reshape(count, length), provenance


class _Recorder(nn.Module):
    """Stands in for a decoder layer and keeps the arguments that the model calls it with."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.arguments = arguments
        return hidden_states


class _MeasuringExperts(nn.Module):
    """Computes a layer's routed experts from their separate matrices and sums the squares of what goes into them."""

    def __init__(self, shape: MoEShape, weights: Mapping[tuple[int, str], torch.Tensor], activation: str) -> None:
        super().__init__()
        self._projections = shape.family.projections
        self._weights = weights
        self._activation = ACT2FN[activation]
        self.hidden = torch.zeros(shape.num_experts, shape.hidden_size, dtype=torch.float64)
        self.intermediate = torch.zeros(shape.num_experts, shape.intermediate_size, dtype=torch.float64)
        self.tokens = torch.zeros(shape.num_experts, dtype=torch.int64)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        output = torch.zeros_like(hidden_states, dtype=torch.float32)
        for expert in top_k_index.unique().tolist():
            token, choice = torch.where(top_k_index == expert)
            x = hidden_states[token]
            gate, up, down = (self._weights[expert, projection].to(x.dtype) for projection in self._projections)
            inner = self._activation(x @ gate.T) * (x @ up.T)
            self.hidden[expert] += x.float().square().sum(dim=0)
            self.intermediate[expert] += inner.float().square().sum(dim=0)
            self.tokens[expert] += len(token)
            output.index_add_(0, token, (inner @ down.T).float() * top_k_weights[token, choice, None].float())
        return output.to(hidden_states.dtype)

    def norms(self) -> ExpertNorms:
        return ExpertNorms(self.hidden.sqrt().float(), self.intermediate.sqrt().float(), self.tokens)


class Calibrator:
    """Carries the calibration tokens' hidden states from layer to layer; nothing else is kept between layers."""

    def __init__(
        self, checkpoint: Checkpoint, config: PretrainedConfig, shape: MoEShape, token_ids: torch.Tensor
    ) -> None:
        self._shape = shape
        self._activation: str = config.hidden_act
        with torch.device("meta"):
            self._model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).model.eval()
        # Rotary frequencies are computed, not loaded, so they must be built where there is memory for them.
        self._model.rotary_emb = type(self._model.rotary_emb)(config)
        embedding = checkpoint.read(["model.embed_tokens.weight"])["model.embed_tokens.weight"].to(torch.bfloat16)
        with torch.inference_mode():
            self._hidden = [nn.functional.embedding(row[None], embedding) for row in token_ids]
            self._arguments = self._record_arguments(self._hidden[0])

    def _record_arguments(self, embedded: torch.Tensor) -> list[dict[str, Any]]:
        """The keyword arguments of every layer (masks, rotary embeddings): all sequences are of one length."""
        layers, norm = self._model.layers, self._model.norm
        recorders = [_Recorder() for _ in layers]
        self._model.layers, self._model.norm = nn.ModuleList(recorders), nn.Identity()
        self._model(inputs_embeds=embedded, use_cache=False)
        self._model.layers, self._model.norm = layers, norm
        return [recorder.arguments for recorder in recorders]

    @torch.inference_mode()
    def advance(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> ExpertNorms | None:
        """Runs the tokens through decoder layer `layer`.

        Args:
            tensors: everything the checkpoint holds for this layer, by its name on disk.

        Returns:
            The norms of its experts' inputs, None for a dense layer.
        """
        module = self._model.layers[layer]
        prefix = self._shape.layer_prefix(layer)
        experts = None
        if layer in self._shape.moe_layers:
            weights = {
                (expert, projection): tensors[self._shape.expert_name(layer, expert, projection)]
                for expert in range(self._shape.num_experts)
                for projection in self._shape.family.projections
            }
            experts = module.mlp.experts = _MeasuringExperts(self._shape, weights, self._activation)
        state = {
            name.removeprefix(prefix).replace(f"{self._shape.family.moe_block}.", "mlp."): tensor.to(torch.bfloat16)
            for name, tensor in tensors.items()
            if not name.startswith(self._shape.experts_prefix(layer) + ".")
        }
        try:
            module.load_state_dict(state, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"layer {layer} does not fit transformers' own model: {reason}") from None
        for index, hidden in enumerate(self._hidden):
            self._hidden[index] = module(hidden, **self._arguments[layer])
        self._model.layers[layer] = nn.Identity()
        return experts.norms() if experts is not None else None
