"""Calibration: real text through the real model, one decoder layer in memory at a time."""

import copy
import re
from typing import Any

import torch
from torch import nn

from ..checkpoints.expert_tensors import layer_names
from ..checkpoints.finite import check_finite, is_finite
from ..checkpoints.source import SourceCheckpoint
from ..errors import CheckpointError, reason_of
from ..merging.layer import RoutedTokens, computing_dtype, split_tokens
from .decoder import Decoder
from .stand_ins import LastLayerReachedError, RecordedExperts, Recorder, WeighedExperts, dispatches

# What older versions of transformers and tools for quantization leave in layers: vLLM loads checkpoints with them, and
# nothing that is computed in bfloat16 depends on them.
_LEFTOVER = re.compile(r"\.(rotary_emb\.(inv_freq|cos_cached|sin_cached)|(q|k|v|kv)_(scale|zero_point))$")

# How far rounding may take what a layer adds from what its experts answer.
_ADDITIVE = 0.05

# What transformers' code meets in a model follows from sizes and choices that config.json states.
_MEND = "; correct config.json, or convert without --calibration"


class HiddenStates:
    """The residual stream of the calibration tokens between two decoder layers.

    `states` is bfloat16 (num_sequences, sequence_length, hidden_size), whatever layers compute in, and is changed in
    place.
    """

    def __init__(self, states: torch.Tensor) -> None:
        self.states = states

    def copy(self) -> "HiddenStates":
        return HiddenStates(self.states.clone())

    @property
    def tokens(self) -> torch.Tensor:
        """A view, (num_tokens, hidden_size)."""
        return self.states.flatten(0, 1)

    def energy(self) -> float:
        """What an error's square, summed over tokens, is compared with: their number times the states' squared norm.

        The mean of the norms is harmonic: the next norm divides token by token, where a state is large an error is
        small.
        """
        return len(self.tokens) / float(self.tokens.float().square().sum(dim=1).reciprocal().mean())

    def check_finite(self, layer: int) -> None:
        """Raises CheckpointError where decoder layer `layer` left numbers that are not finite."""
        if not is_finite(self.states):
            raise CheckpointError(
                f"layer {layer}: the calibration text comes out of it as numbers that are not finite, though its "
                f"weights are finite, so what it computes overflows bfloat16; repair the checkpoint, or convert "
                f"without --calibration"
            )

    def add(self, output: torch.Tensor) -> None:
        """Adds the experts' output, float32 (num_tokens, hidden_size), in float32."""
        for tokens, part in zip(split_tokens(self.tokens), split_tokens(output), strict=True):
            tokens.copy_(tokens.float() + part)


class Calibrator:
    """transformers' own model and the calibration tokens that go through it; one decoder layer has weights at a time.

    All sequences are of one length and start at position 0, so every one has the masks and rotary embeddings of the
    first.
    """

    def __init__(self, checkpoint: SourceCheckpoint, model: Any, token_ids: torch.Tensor, device: torch.device) -> None:
        """
        Args:
            model: of the checkpoint's config, without weights; see `build_model`. It is changed.
            token_ids: int64 (num_sequences, sequence_length).

        Raises:
            CheckpointError: transformers cannot build the rotary embeddings, or has a tensor in a layer that the
                checkpoint lacks.
        """
        self.token_ids = token_ids
        self.left_out: list[str] = []
        """The tensors of decoder layers that transformers' model has no place for, but for well-known leftovers."""
        self._checkpoint = checkpoint
        self._shape = checkpoint.shape
        self._device = device
        self._computing = computing_dtype(device)
        self._decoder = Decoder(model, checkpoint.path / "config.json", device)
        self._model = self._decoder.module
        self._names = [self._match_names(layer) for layer in range(len(self._model.layers))]
        self.left_out.sort()
        self._embedding = checkpoint.read([self._decoder.embedding])[self._decoder.embedding]
        self._recorders: list[Recorder] = []
        self._loaded: int | None = None
        self._module: Any = nn.Identity()
        self._experts: RecordedExperts | WeighedExperts = WeighedExperts(1)
        self._is_additive = checkpoint.shape.family.is_declared

    def _match_names(self, layer: int) -> dict[str, str]:
        """The name on disk of every tensor of a decoder layer outside its routed experts, by its name in the module."""
        shape, wanted = self._shape, self._decoder.layer_names(layer)
        # `check_dense` knows nothing of the block of a layer that transformers, unlike vLLM, takes for an MoE layer.
        missing = sorted(wanted.values() - self._checkpoint.tensors.keys())
        if missing or (self._decoder.experts_name(layer) is None) == (layer in shape.moe_layers):
            more = f", which has {len(missing)} tensors more there, the first is {missing[0]}" if missing else ""
            raise CheckpointError(
                f"{self._checkpoint.path}: layer {layer} does not fit transformers' own model{more}; download the "
                f"checkpoint again, or convert without --calibration"
            )
        prefix, experts = shape.layer_prefix(layer), {name for names in layer_names(shape, layer) for name in names}
        left_out = {name for name in self._checkpoint.tensors if name.startswith(prefix)} - set(wanted.values())
        self.left_out += [name for name in left_out - experts if not _LEFTOVER.search(name)]
        return wanted

    @torch.inference_mode()
    def embed(self) -> HiddenStates:
        """The states of all tokens before the first layer.

        Raises:
            CheckpointError: they are not finite, or transformers' model fails.
        """
        states = nn.functional.embedding(self.token_ids, self._embedding).to(self._device, torch.bfloat16)
        if not is_finite(states):
            for row in self.token_ids.unique().tolist():
                stored = self._embedding[row]
                check_finite(f"row {row} of {self._decoder.embedding}", stored, stored.to(torch.bfloat16))
        layers = self._model.layers
        recorders = [Recorder(layer, is_last=layer is layers[-1]) for layer in layers]
        self._model.layers = nn.ModuleList(recorders)
        for sequence in states.split(1):
            try:
                self._model(inputs_embeds=sequence.to(self._computing), use_cache=False)
            except LastLayerReachedError:
                pass
            except Exception as error:
                raise CheckpointError(f"transformers' own model does not run: {reason_of(error)}{_MEND}") from None
            # Some models scale their embeddings.
            sequence.copy_(recorders[0].hidden_states)
        self._model.layers, self._recorders = layers, recorders
        return HiddenStates(states)

    @torch.inference_mode()
    def run(self, layer: int, hidden: HiddenStates) -> RoutedTokens | None:
        """Carries `hidden` through a decoder layer, without the output of its routed experts: `add` that to it.

        Returns:
            What enters the routed experts, with weights by which their outputs add to the residual stream; None for a
            dense layer, which leaves nothing to be added.

        Raises:
            CheckpointError: the layer's tensors are not those of transformers' own, one of them or what comes out is
                not finite, or transformers' layer fails.
        """
        if layer != self._loaded:
            self._load(layer)
        if layer in self._shape.moe_layers and not self._is_additive:
            self._check_additive(layer, hidden.states[:1])
        for index in range(len(hidden.states)):
            states = hidden.states[index : index + 1]
            states.copy_(self._run_module(layer, states))
        hidden.check_finite(layer)
        if layer not in self._shape.moe_layers:
            return None
        calls, self._experts.calls = self._experts.calls, []
        entering, ids, weights = (torch.cat(parts) for parts in zip(*calls, strict=True))
        if not (is_finite(entering) and is_finite(weights)):
            raise CheckpointError(
                f"layer {layer}: the calibration text reaches its experts as numbers that are not finite, though "
                f"all weights before them are finite, so what it computes overflows bfloat16; repair the checkpoint, "
                f"or convert without --calibration"
            )
        return RoutedTokens(entering, ids, weights * self._shape.residual_multiplier)

    def _run_module(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        """What the loaded layer makes of one sequence, (1, sequence_length, hidden_size)."""
        recorder = self._recorders[layer]
        try:
            output = self._module(states.to(self._computing), *recorder.arguments, **recorder.named_arguments)
        except Exception as error:
            raise CheckpointError(
                f"layer {layer} of transformers' own model does not run: {reason_of(error)}{_MEND}"
            ) from None
        return output[0] if isinstance(output, tuple) else output

    def _check_additive(self, layer: int, states: torch.Tensor) -> None:
        """Raises CheckpointError where a layer does not add to the residual stream what its experts answer.

        A declaration says that it does, and by which multiplier; without one it is tried, once.
        """
        assert isinstance(self._experts, RecordedExperts)
        without = self._run_module(layer, states)
        answer = torch.randn(states.shape, generator=torch.Generator().manual_seed(layer)).to(states.device)
        self._experts.answer = answer = answer * without.float().square().mean().sqrt()
        added = (self._run_module(layer, states) - without).float()
        self._experts.answer, self._experts.calls = None, []
        expected = answer * self._shape.residual_multiplier
        if (added - expected).norm() > _ADDITIVE * expected.norm():
            raise CheckpointError(
                f"layer {layer} of transformers' own model of {self._shape.family.architecture} does not add its "
                f"experts' output to everything else as it is, so nothing can be calibrated; convert without "
                f"--calibration"
            )
        self._is_additive = True

    def _load(self, layer: int) -> None:
        """Loads the weights of decoder layer `layer`, and drops those of the layer before."""
        shape = self._shape
        self._loaded = None
        # The model's own layer stays without memory.
        self._module = copy.deepcopy(self._model.layers[layer])
        if layer in shape.moe_layers:
            self._experts = self._record_experts(layer)
        stored = self._checkpoint.read(self._names[layer].values())
        state = {}
        for module_name, name in self._names[layer].items():
            state[module_name] = stored[name].to(self._device, self._dtype(module_name))
            check_finite(name, stored[name], state[module_name])
        try:
            # Experts alone are missing: they are not run.
            self._module.load_state_dict(state, strict=False, assign=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"layer {layer} does not fit transformers' own model: {reason}") from None
        self._loaded = layer

    def _record_experts(self, layer: int) -> RecordedExperts | WeighedExperts:
        name = self._decoder.experts_name(layer) or ""
        module = self._module.get_submodule(name)
        if self._shape.family.weighs_inputs:
            experts = WeighedExperts(self._shape.num_experts)
            self._module.set_submodule(name, experts)
            return experts
        if not dispatches(module):
            raise CheckpointError(
                f"transformers' own model of {self._shape.family.architecture} does not let others compute its "
                f"experts; convert without --calibration"
            )
        return RecordedExperts(module)

    def _dtype(self, name: str) -> torch.dtype:
        """What a tensor is loaded as: as transformers does in a model of bfloat16, or all in float32."""
        in_float32 = any(part in name for part in self._model._keep_in_fp32_modules_strict)
        return torch.float32 if in_float32 else self._computing
