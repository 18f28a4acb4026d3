"""AMD's zentorch, from the package of that name: vLLM calls it for experts on Zen CPUs where it is installed.

It puts weights into an order of its own when they are first used, in place, and its cache holds one shape of layer a
process.
"""

import importlib
import importlib.util

import torch

from benchmarks.cpu_moe.engine import Engine

INT4_GROUP = 128
KINDS = {"zentorch_bf16": 2.0, "zentorch_int8": 1.0, "zentorch_int4": 0.5}


class Zentorch(Engine):
    """`zentorch_fused_moe` on weights and scales as vLLM prepares them; not to be copied once it has run."""

    def __init__(self, name: str, tensors: tuple[torch.Tensor, ...]) -> None:
        self.name, self.bytes_per_weight, self._tensors = name, KINDS[name], tensors

    def run(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(x)
        w13, w2, *scales = self._tensors
        torch.ops.zentorch.zentorch_fused_moe(
            output, x, w13, w2, None, None, topk_weights, topk_ids, False, "silu", *scales
        )
        return output

    def copy(self) -> "Zentorch":
        return Zentorch(self.name, tuple(tensor.clone() for tensor in self._tensors))


def build_zentorch(w13: torch.Tensor, w2: torch.Tensor) -> tuple[list[Engine], list[str]]:
    """The kinds that run here, from BF16 experts, and a sentence for each that does not."""
    if importlib.util.find_spec("zentorch") is None:
        return [], ["zentorch is not installed: its peers are left out"]
    importlib.import_module("zentorch")

    engines: list[Engine] = []
    reasons = []
    for name, convert in (("zentorch_bf16", _bf16), ("zentorch_int8", _int8), ("zentorch_int4", _int4)):
        engine = Zentorch(name, convert(w13, w2))
        try:
            sound = _try(engine, w13.shape[2])
        except RuntimeError as error:
            reasons.append(f"{name} cannot run on this CPU and is left out: {str(error).splitlines()[0]}")
            continue
        if sound:
            engines.append(Zentorch(name, convert(w13, w2)))
        else:
            reasons.append(f"{name} computes numbers that are not finite on this CPU and is left out")
    return engines, reasons


def _try(engine: Zentorch, hidden_size: int) -> bool:
    """Whether a call gives finite numbers."""
    output = engine.run(torch.randn(1, hidden_size).bfloat16(), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32))
    # The cache goes by addresses, and the next weights may lie where these did.
    torch.ops.zentorch.zentorch_flush_moe_weight_cache()
    return bool(output.isfinite().all())


def _bf16(w13: torch.Tensor, w2: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return w13.clone(), w2.clone()


def _int8(w13: torch.Tensor, w2: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A float32 scale per output row, activations rounded to INT8 token by token (W8A8)."""
    # Expert by expert: a layer in float32 would be gigabytes.
    weights, scales = [], []
    for weight in (w13, w2):
        scale = weight.abs().amax(dim=-1, keepdim=True).float() / 127
        rounded = [(each.float() / of_rows).round().to(torch.int8) for each, of_rows in zip(weight, scale, strict=True)]
        weights.append(torch.stack(rounded))
        scales.append(scale.squeeze(-1))
    return (*weights, *scales)


def _int4(w13: torch.Tensor, w2: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A BF16 scale per 128 columns, (experts, groups, rows)."""
    weights, scales = [], []
    for weight in (w13, w2):
        packed, of_groups = [], []
        for each in weight:
            groups = each.float().view(each.shape[0], -1, INT4_GROUP)
            scale = groups.abs().amax(dim=-1, keepdim=True) / 7
            integers = (groups / scale).round().to(torch.int8).view(each.shape)
            packed.append(torch.ops.zentorch.zentorch_woq_repack_weight(integers))
            of_groups.append(scale.squeeze(-1).T.contiguous().bfloat16())
        weights.append(torch.stack(packed))
        scales.append(torch.stack(of_groups))
    return (*weights, *scales)
