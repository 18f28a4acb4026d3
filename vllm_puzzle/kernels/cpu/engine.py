"""The CPU engine: one object for each instruction set, over the same compiled library."""

import os
from dataclasses import dataclass

import torch

from ..checks import check_call, check_coded_call, coded_misfit, misfit
from ..coded import CodedMatrices
from ..engine import CodedArguments, Engine, padded
from ..errors import EngineError
from .coded_call import coded_fits, run_coded_call
from .levels import choose_isa, unusable
from .library import ACTIVATIONS, CALL_LAYOUT, DTYPES, ID_TYPES, Isa, load_library
from .refusal import explain
from .slots import BLOCK, empty_bytes, empty_slots, order_codes_, tile_slots_
from .workspace import WORKSPACE


@dataclass(frozen=True)
class CpuEngine(Engine):
    """The kernels for one instruction set. A result does not depend on the number of threads."""

    isa: Isa

    family = "cpu"
    multiple = BLOCK
    reads_codes = True
    # There is no graph to hold it.
    can_be_captured = False

    @property
    def name(self) -> str:
        return f"cpu-{self.isa.name.lower()}"

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return tuple(DTYPES) if self.isa is Isa.PORTABLE else (torch.bfloat16,)

    def suits(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def choose(self, device: torch.device, dtype: torch.dtype) -> Engine:
        if device.type != "cpu":
            raise EngineError(
                f"VLLM_PUZZLE_ENGINE=cpu cannot compute on {device.type}; choose VLLM_PUZZLE_ENGINE=auto or reference"
            )
        return CPU_ENGINES[choose_isa(os.environ.get("VLLM_PUZZLE_CPU_ISA", "auto"), dtype)]

    def allocate(self, num_slots: int, hidden_size: int, intermediate_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, intermediate = padded(hidden_size, BLOCK), padded(intermediate_size, BLOCK)
        return empty_slots(num_slots, 2 * intermediate, hidden), empty_slots(num_slots, hidden, intermediate)

    def prepare(self, w13: torch.Tensor, w2: torch.Tensor, max_num_tokens: int, top_k: int) -> None:
        tile_slots_(w13, w2)
        num_slots, padded_hidden, padded_intermediate = w2.shape
        self._make_room(num_slots, padded_hidden, padded_intermediate, max_num_tokens, top_k)

    def zero_bytes(self, num_bytes: int) -> torch.Tensor:
        return empty_bytes(num_bytes)

    def prepare_codes(self, w13: CodedMatrices, w2: CodedMatrices, max_num_tokens: int, top_k: int) -> None:
        order_codes_(w13, w2, self.isa)
        num_experts, _, rows = w2.scale.shape
        self._make_room(num_experts, 2 * rows, w13.scale.shape[2], max_num_tokens, top_k)

    def _make_room(
        self, num_slots: int, padded_hidden: int, padded_intermediate: int, max_num_tokens: int, top_k: int
    ) -> None:
        with WORKSPACE.lock:
            sizes = (0, max_num_tokens, padded_hidden, padded_hidden, padded_intermediate, num_slots, 0, top_k)
            CALL_LAYOUT.pack_into(WORKSPACE.call, 0, *[0] * 8, *sizes, 0, 0, 0, 0, self.isa, 0)
            WORKSPACE.grow(load_library().puzzlemoe_workspace_bytes(WORKSPACE.call))

    def run_coded(self, *arguments: *CodedArguments) -> torch.Tensor:
        if reason := unusable(self.isa):
            raise EngineError(f"the engine {self.name} cannot be used: {reason}")
        *tensors, activation, _ = arguments
        if not (activation in ACTIVATIONS and coded_fits(self.isa, *tensors)):
            check_coded_call(self, *arguments)
            raise coded_misfit(self, *tensors)
        return run_coded_call(self.isa, *arguments)

    # Long, since every line and every call of Python costs time here; see CALL_LAYOUT.
    def run(
        self,
        x: torch.Tensor,
        w13: torch.Tensor,
        w2: torch.Tensor,
        slot_of_expert: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: str,
        apply_router_weight_on_input: bool,
    ) -> torch.Tensor:
        if reason := unusable(self.isa):
            raise EngineError(f"the engine {self.name} cannot be used: {reason}")
        if not (activation in ACTIVATIONS and _fits(self.isa, x, w13, w2, slot_of_expert, topk_weights, topk_ids)):
            tensors = (x, w13, w2, slot_of_expert, topk_weights, topk_ids)
            check_call(self, *tensors, activation, apply_router_weight_on_input)
            raise misfit(self, *tensors)
        if topk_weights.dtype is not torch.float32:
            topk_weights = topk_weights.float()
        if not (x.is_contiguous() and topk_weights.is_contiguous() and topk_ids.is_contiguous()):
            x, topk_weights, topk_ids = x.contiguous(), topk_weights.contiguous(), topk_ids.contiguous()
        num_tokens, hidden_size = x.shape
        num_slots, padded_hidden, padded_intermediate = w2.shape
        output = torch.empty_like(x)
        run = load_library().puzzlemoe_packed_moe
        with WORKSPACE.lock:
            # A second turn only where the workspace was too small, which `prepare` is there to prevent.
            for _ in range(2):
                CALL_LAYOUT.pack_into(
                    WORKSPACE.call,
                    0,
                    x.data_ptr(),
                    w13.data_ptr(),
                    w2.data_ptr(),
                    slot_of_expert.data_ptr(),
                    topk_weights.data_ptr(),
                    topk_ids.data_ptr(),
                    output.data_ptr(),
                    WORKSPACE.address,
                    WORKSPACE.num_bytes,
                    num_tokens,
                    hidden_size,
                    padded_hidden,
                    padded_intermediate,
                    num_slots,
                    slot_of_expert.shape[0],
                    topk_ids.shape[1],
                    ID_TYPES[topk_ids.dtype],
                    DTYPES[x.dtype],
                    ACTIVATIONS[activation],
                    apply_router_weight_on_input,
                    self.isa,
                    0,
                )
                result: int = run(WORKSPACE.call)
                if result <= 0:
                    break
                WORKSPACE.grow(result)
        if result < 0:
            made_for_call = {"x": x, "topk_weights": topk_weights, "topk_ids": topk_ids, "output": output}

            def unknown() -> str:
                return (
                    f"slot_of_expert holds {int(slot_of_expert.max())}, {num_slots} slots have codes 0 to "
                    f"{2 * num_slots - 1}"
                )

            raise ValueError(explain(result, made_for_call, slot_of_expert, f"{num_slots} slots", unknown))
        return output


CPU_ENGINES = tuple(CpuEngine(isa) for isa in Isa)
"""From the least to the most capable; the index is the Isa."""


def _fits(
    isa: Isa,
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    slot_of_expert: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
) -> bool:
    """Whether `run` takes these: compiled code sees addresses, and would trust anything."""
    num_slots, rows, columns = w13.shape
    num_tokens, hidden_size = x.shape
    return (
        0 <= columns - hidden_size < BLOCK
        and not columns % BLOCK
        and not rows % (2 * BLOCK)
        and w2.shape == (num_slots, columns, rows // 2)
        and topk_ids.shape[0] == num_tokens
        and topk_ids.shape == topk_weights.shape
        and (x.dtype is torch.bfloat16 or (isa == Isa.PORTABLE and x.dtype in DTYPES))
        and w13.dtype is torch.int16
        and w2.dtype is torch.int16
        and slot_of_expert.dtype is torch.int32
        and topk_ids.dtype in ID_TYPES
        and w13.is_contiguous()
        and w2.is_contiguous()
        and slot_of_expert.is_contiguous()
        and x.is_cpu
        and w13.is_cpu
        and w2.is_cpu
        and slot_of_expert.is_cpu
        and topk_ids.is_cpu
        and topk_weights.is_cpu
        # A storage can be freed or cut off under what stays from call to call. Compiled code notices a null address,
        # which is enough for what was made a moment ago.
        and w13.untyped_storage().nbytes() >= num_slots * rows * columns * 2
        and w2.untyped_storage().nbytes() >= num_slots * rows * columns
        and slot_of_expert.untyped_storage().nbytes() >= slot_of_expert.shape[0] * 4
    )
