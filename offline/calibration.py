"""Calibration: real text through the real model, one decoder layer in memory at a time."""

import copy
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from vllm_puzzle.format import Calibration

from .checkpoint import Checkpoint
from .defaults import SEQUENCE_LENGTH
from .errors import CheckpointError
from .families import MoEShape
from .layer import TOKENS_AT_ONCE, RoutedTokens
from .wording import label


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
        source=label(path), sha256=hashlib.sha256(raw).hexdigest(), sequences=count, sequence_length=length
    )
    return ids[: count * length].reshape(count, length), provenance


class _Recorder(nn.Module):
    """Stands in for a decoder layer and keeps what the model calls it with."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_states = torch.empty(0)
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.hidden_states, self.arguments = hidden_states, arguments
        return hidden_states


class _SilentExperts(nn.Module):
    """Stands in for a layer's routed experts: keeps what would enter them and answers zero.

    A decoder layer adds its experts' outputs to everything else, so what comes out is the layer without them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        self.calls.append((hidden_states, top_k_index, top_k_weights.float()))
        return torch.zeros_like(hidden_states)


class _SilentWeighedExperts(_SilentExperts):
    """The same where router weights go into the experts, one of which is chosen: each weighed input comes out once.

    Such experts are called with all tokens once an expert, one expert after the other, and what an expert does not get
    is zero: (num_experts * num_tokens, hidden_size).
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self._num_experts = num_experts

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        by_expert = hidden_states.unflatten(0, (self._num_experts, -1))
        chosen = by_expert.abs().amax(dim=2).argmax(dim=0)[:, None]
        return super().forward(by_expert.sum(dim=0), chosen, torch.ones_like(chosen)).new_zeros(hidden_states.shape)


class HiddenStates:
    """The calibration tokens between two decoder layers: `states` is (num_sequences, sequence_length, hidden_size)."""

    def __init__(self, states: torch.Tensor) -> None:
        self.states = states

    def copy(self) -> "HiddenStates":
        return HiddenStates(self.states.clone())

    @property
    def tokens(self) -> torch.Tensor:
        """A view, (num_tokens, hidden_size)."""
        return self.states.flatten(0, 1)

    def energy(self) -> float:
        """What an error's square, summed over tokens, is held against: their number times the states' squared norm.

        Of the norm the harmonic mean: the next norm divides token by token, where a state is large an error is small.
        """
        return len(self.tokens) / float(self.tokens.float().square().sum(dim=1).reciprocal().mean())

    def add(self, output: torch.Tensor) -> None:
        """Adds what the experts answer, float32 (num_tokens, hidden_size)."""
        for tokens, part in zip(self.tokens.split(TOKENS_AT_ONCE), output.split(TOKENS_AT_ONCE), strict=True):
            tokens.copy_(tokens.float() + part)


class Calibrator:
    """The model without its weights; a decoder layer's are there from `load` until the next `load`.

    All sequences are of one length and start at position 0, so every one has the masks and rotary embeddings of the
    first.
    """

    def __init__(self, checkpoint: Checkpoint, config: PretrainedConfig, shape: MoEShape, device: torch.device) -> None:
        self._shape = shape
        self._device = device
        with torch.device("meta"):
            self._model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).model.eval()
        # Rotary frequencies are computed, not loaded, so they must be built where there is memory for them.
        if self._model.rotary_emb is not None:
            self._model.rotary_emb = type(self._model.rotary_emb)(config).to(device)
        self._embedding = checkpoint.read(["model.embed_tokens.weight"])["model.embed_tokens.weight"]
        self._arguments: list[dict[str, Any]] = []
        self._layer = -1
        self._module: Any = nn.Identity()
        self._experts = _SilentExperts()

    @torch.inference_mode()
    def embed(self, token_ids: torch.Tensor) -> HiddenStates:
        """The states before the first layer, bfloat16, of `token_ids` (num_sequences, sequence_length), int64."""
        states = nn.functional.embedding(token_ids, self._embedding).to(self._device, torch.bfloat16)
        layers, norm = self._model.layers, self._model.norm
        recorders = [_Recorder() for _ in layers]
        self._model.layers, self._model.norm = nn.ModuleList(recorders), nn.Identity()
        for sequence in states.split(1):
            self._model(inputs_embeds=sequence, use_cache=False)
            # Some models scale their embeddings.
            sequence.copy_(recorders[0].hidden_states)
        self._model.layers, self._model.norm = layers, norm
        self._arguments = [recorder.arguments for recorder in recorders]
        return HiddenStates(states)

    def load(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes the weights of decoder layer `layer` from all that the checkpoint holds for it, by name on disk.

        Raises:
            CheckpointError: they are not those of transformers' own model.
        """
        shape = self._shape
        prefix, experts = shape.layer_prefix(layer), shape.experts_prefix(layer) + "."
        # The model's own layer stays without memory, for the next time.
        self._layer, self._module = layer, copy.deepcopy(self._model.layers[layer])
        if layer in shape.moe_layers:
            self._experts = _SilentWeighedExperts(shape.num_experts) if shape.family.weighs_inputs else _SilentExperts()
            self._module.get_submodule(shape.family.module).experts = self._experts
        state = {
            shape.family.module_name(name.removeprefix(prefix)): tensor
            for name, tensor in tensors.items()
            if not name.startswith(experts)
        }
        state = {name: tensor.to(self._device, self._dtype(name)) for name, tensor in state.items()}
        try:
            self._module.load_state_dict(state, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"layer {layer} does not fit transformers' own model: {reason}") from None

    def _dtype(self, name: str) -> torch.dtype:
        """What transformers itself loads a tensor as, in a model of bfloat16."""
        in_float32 = any(part in name for part in self._model._keep_in_fp32_modules_strict)
        return torch.float32 if in_float32 else torch.bfloat16

    @torch.inference_mode()
    def run(self, hidden: HiddenStates) -> RoutedTokens | None:
        """Carries `hidden` through the loaded layer, without the output of its routed experts: `add` that to it.

        Returns:
            What enters the routed experts, with weights by which their outputs add to the residual stream; None for a
            dense layer, which leaves nothing to be added.

        Raises:
            CheckpointError: it is not finite.
        """
        for index in range(len(hidden.states)):
            states = hidden.states[index : index + 1]
            states.copy_(self._module(states, **self._arguments[self._layer]))
        if self._layer not in self._shape.moe_layers:
            return None
        calls, self._experts.calls = self._experts.calls, []
        entering, ids, weights = (torch.cat(parts) for parts in zip(*calls, strict=True))
        if not bool(entering.isfinite().all()):
            raise CheckpointError(
                f"layer {self._layer}: the calibration text reaches its experts as numbers that are not finite, so a "
                f"weight before them is NaN, infinite or far too large; repair the checkpoint"
            )
        return RoutedTokens(entering, ids, weights * self._shape.residual_multiplier)
