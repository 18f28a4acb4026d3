"""Calibration: real text through the real model, one decoder layer in memory at a time."""

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from vllm_puzzle.format import Calibration

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.families import MoEShape
from ..checkpoints.finite import check_finite, is_finite
from ..defaults import SEQUENCE_LENGTH
from ..errors import CheckpointError, reason_of
from ..merging.layer import TOKENS_AT_ONCE, RoutedTokens
from ..wording import label
from .calibration_text import first_tokens, load_tokenizer, text_sha256
from .stand_ins import Recorder, SilentExperts, SilentWeighedExperts

EMBEDDING = "model.embed_tokens.weight"

# What older versions of transformers and tools for quantization leave in layers: vLLM loads checkpoints with them, and
# nothing that is computed in bfloat16 depends on them.
_LEFTOVER = re.compile(r"\.(rotary_emb\.(inv_freq|cos_cached|sin_cached)|(q|k|v|kv)_(scale|zero_point))$")


def read_calibration(
    path: Path, checkpoint: Checkpoint, config: Any, sequences: int
) -> tuple[torch.Tensor, Calibration]:
    """Token ids (num_sequences, sequence_length), int64, from a UTF-8 text file, and what to record about them.

    Text shorter than one sequence is one shorter sequence. The checksum is that of the whole file.

    Raises:
        CheckpointError: the text cannot be read, is too short, or has a token that the model does not know; or there is
            no tokenizer.
    """
    sha256 = text_sha256(path)
    tokenizer = load_tokenizer(checkpoint.path)
    longest = min(SEQUENCE_LENGTH, config.max_position_embeddings)
    ids = first_tokens(path, tokenizer, sequences * longest)
    length = min(longest, len(ids))
    if length < 2:
        raise CheckpointError(f"calibration text {path} has {len(ids)} tokens; give some pages of text")
    count = min(sequences, len(ids) // length)
    ids = ids[: count * length]
    largest, rows = int(ids.max()), _embedding_rows(checkpoint)
    if largest >= rows:
        raise CheckpointError(
            f"{checkpoint.path}: the tokenizer reads {tokenizer.convert_ids_to_tokens(largest)!r} in {path} as token "
            f"{largest}, and {EMBEDDING} has rows for 0 to {rows - 1}; put the model's own tokenizer there"
        )
    provenance = Calibration(source=label(path), sha256=sha256, sequences=count, sequence_length=length)
    return ids.reshape(count, length), provenance


def _embedding_rows(checkpoint: Checkpoint) -> int:
    info = checkpoint.tensors.get(EMBEDDING)
    if info is None or len(info.shape) != 2:
        raise CheckpointError(
            f"{checkpoint.path}: {EMBEDDING} is missing or no matrix, and calibration needs it; download the "
            f"checkpoint again"
        )
    return info.shape[0]


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

    def check_finite(self, layer: int) -> None:
        """Raises CheckpointError where a decoder layer left numbers that are not finite."""
        if not is_finite(self.states):
            raise CheckpointError(
                f"layer {layer}: the calibration text comes out of it as numbers that are not finite, though its "
                f"weights are finite, so what it computes overflows bfloat16; repair the checkpoint, or convert "
                f"without --calibration"
            )

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
        """
        Raises:
            CheckpointError: transformers cannot build the model, or a layer lacks a tensor of it.
        """
        self._shape = shape
        self._device = device
        self._model = _build(config, checkpoint.path, device)
        self.left_out = self._compare_names(checkpoint)
        """The tensors of decoder layers that transformers' model has no place for, but for well-known leftovers."""
        _embedding_rows(checkpoint)
        self._embedding = checkpoint.read([EMBEDDING])[EMBEDDING]
        self._arguments: list[dict[str, Any]] = []
        self._layer = -1
        self._module: Any = nn.Identity()
        self._experts = SilentExperts()

    def _compare_names(self, checkpoint: Checkpoint) -> list[str]:
        shape, left_out = self._shape, []
        for layer, module in enumerate(self._model.layers):
            prefix = shape.layer_prefix(layer)
            names = {
                shape.family.module_name(name.removeprefix(prefix)): name
                for name in checkpoint.tensors
                if name.startswith(prefix) and not name.startswith(f"{shape.experts_prefix(layer)}.")
            }
            wanted = set(module.state_dict())
            if layer in shape.moe_layers:
                wanted = {name for name in wanted if not name.startswith(f"{shape.family.module}.experts.")}
            missing = sorted(wanted - names.keys())
            if missing:
                raise CheckpointError(
                    f"{checkpoint.path}: layer {layer} does not fit transformers' own model, which has {len(missing)} "
                    f"tensors more there, the first is {missing[0]}; download the checkpoint again"
                )
            left_out += [name for module_name, name in names.items() if module_name not in wanted]
        return sorted(name for name in left_out if not _LEFTOVER.search(name))

    @torch.inference_mode()
    def embed(self, token_ids: torch.Tensor) -> HiddenStates:
        """The states before the first layer, bfloat16, of `token_ids` (num_sequences, sequence_length), int64.

        Raises:
            CheckpointError: they are not finite, or transformers' model fails.
        """
        states = nn.functional.embedding(token_ids, self._embedding).to(self._device, torch.bfloat16)
        if not is_finite(states):
            for row in token_ids.unique().tolist():
                stored = self._embedding[row]
                check_finite(f"row {row} of {EMBEDDING}", stored, stored.to(torch.bfloat16))
        layers, norm = self._model.layers, self._model.norm
        recorders = [Recorder() for _ in layers]
        self._model.layers, self._model.norm = nn.ModuleList(recorders), nn.Identity()
        for sequence in states.split(1):
            try:
                self._model(inputs_embeds=sequence, use_cache=False)
            except Exception as error:
                raise CheckpointError(f"transformers' own model does not run: {reason_of(error)}{_MEND}") from None
            # Some models scale their embeddings.
            sequence.copy_(recorders[0].hidden_states)
        self._model.layers, self._model.norm = layers, norm
        self._arguments = [recorder.arguments for recorder in recorders]
        return HiddenStates(states)

    def load(self, layer: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes the weights of decoder layer `layer` from all that the checkpoint holds for it, by name on disk.

        Raises:
            CheckpointError: they are not those of transformers' own model, or one is not finite.
        """
        shape = self._shape
        prefix, experts = shape.layer_prefix(layer), shape.experts_prefix(layer) + "."
        # The model's own layer stays without memory, for the next time.
        self._layer, self._module = layer, copy.deepcopy(self._model.layers[layer])
        if layer in shape.moe_layers:
            self._experts = SilentWeighedExperts(shape.num_experts) if shape.family.weighs_inputs else SilentExperts()
            self._module.get_submodule(shape.family.module).experts = self._experts
        places = self._module.state_dict().keys()
        state = {}
        for name, tensor in tensors.items():
            module_name = shape.family.module_name(name.removeprefix(prefix))
            if name.startswith(experts) or module_name not in places:
                continue
            state[module_name] = tensor.to(self._device, self._dtype(module_name))
            check_finite(name, tensor, state[module_name])
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
            CheckpointError: it is not finite, or transformers' layer fails.
        """
        for index in range(len(hidden.states)):
            states = hidden.states[index : index + 1]
            try:
                states.copy_(self._module(states, **self._arguments[self._layer]))
            except Exception as error:
                raise CheckpointError(
                    f"layer {self._layer} of transformers' own model does not run: {reason_of(error)}{_MEND}"
                ) from None
        hidden.check_finite(self._layer)
        if self._layer not in self._shape.moe_layers:
            return None
        calls, self._experts.calls = self._experts.calls, []
        entering, ids, weights = (torch.cat(parts) for parts in zip(*calls, strict=True))
        if not (is_finite(entering) and is_finite(weights)):
            raise CheckpointError(
                f"layer {self._layer}: the calibration text reaches its experts as numbers that are not finite, though "
                f"all weights before them are finite, so what it computes overflows bfloat16; repair the checkpoint, "
                f"or convert without --calibration"
            )
        return RoutedTokens(entering, ids, weights * self._shape.residual_multiplier)


# What transformers' code meets in a model follows from sizes and choices that config.json states.
_MEND = "; correct config.json"


def _build(config: PretrainedConfig, path: Path, device: torch.device) -> Any:
    """transformers' own model, bfloat16, without memory for its weights."""
    # How attention and experts are computed changes nothing that is kept, and what a config asks for (flash attention,
    # where it was written by a training run) may not be installed here.
    config = copy.deepcopy(config)
    config._attn_implementation = None
    config._experts_implementation = None
    try:
        with torch.device("meta"):
            causal = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
        model = causal.model.eval()
        # Rotary frequencies are computed, not loaded, so they must be built where there is memory for them.
        if model.rotary_emb is not None:
            model.rotary_emb = type(model.rotary_emb)(config).to(device)
    except Exception as error:
        raise CheckpointError(
            f"transformers cannot build the model that {path / 'config.json'} describes: {reason_of(error)}; correct it"
        ) from None
    return model
