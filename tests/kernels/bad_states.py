"""`python -m tests.kernels.bad_states ENGINE`: calls the operators in states that compiled code must not be led into.

A program of its own, because what it guards against ends the process. Prints a line for each state: its name and what
the operator said.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch

from tests.kernels.cases import Case
from tests.kernels.coded_cases import STAYING, CodedCase
from vllm_puzzle.kernels import ENGINES

Arguments = dict[str, Any]


def on_meta(name: str) -> Callable[[Arguments], None]:
    def change(arguments: Arguments) -> None:
        arguments[name] = arguments[name].to("meta")

    return change


def freed(name: str, left: int = 0) -> Callable[[Arguments], None]:
    """As a sleeping or sharded model frees weights: the tensor keeps its shape, its storage has `left` bytes."""

    def change(arguments: Arguments) -> None:
        arguments[name] = arguments[name].clone()
        arguments[name].untyped_storage().resize_(left)

    return change


def changed(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Arguments], None]:
    def change(arguments: Arguments) -> None:
        arguments[name] = make(arguments[name])

    return change


STATES: dict[str, Callable[[Arguments], None]] = {
    "w13 on meta": on_meta("w13"),
    "w2 on meta": on_meta("w2"),
    "slot_of_expert on meta": on_meta("slot_of_expert"),
    "w13 freed": freed("w13"),
    "w2 freed": freed("w2"),
    "slot_of_expert freed": freed("slot_of_expert"),
    "w13 cut off": freed("w13", left=64),
    "slot beyond the last": changed("slot_of_expert", lambda table: table + 10),
    "random slots": changed("slot_of_expert", lambda table: torch.full_like(table, 0x7F7F7F7F)),
    "fewer slots in w2": changed("w2", lambda words: words[:-1]),
    "fewer slots than the table": lambda arguments: arguments.update(w13=arguments["w13"][:1], w2=arguments["w2"][:1]),
    "expert beyond the last": changed("topk_ids", lambda ids: ids + 8),
}

# States of what is made for each call, which the reference engine leaves to torch.
ACTIVATION_STATES: dict[str, Callable[[Arguments], None]] = {
    "x freed": freed("x"),
    "topk_ids freed": freed("topk_ids"),
    "topk_weights freed": freed("topk_weights"),
}


CODED_STATES: dict[str, Callable[[Arguments], None]] = {
    **{f"{name} on meta": on_meta(name) for name in (*STAYING, "expert_map")},
    **{f"{name} freed": freed(name) for name in (*STAYING, "expert_map")},
    "w2_codes cut off": freed("w2_codes", left=64),
    "place beyond the last": changed("expert_map", lambda table: table + 10),
    "random places": changed("expert_map", lambda table: torch.full_like(table, 0x7F7F7F7F)),
    "random index": changed("w13_index", lambda index: torch.full_like(index, 0x7F7F7F7F7F7F7F7F)),
    "negative index": changed("w2_index", lambda index: index - torch.tensor([2**40, 0])),
    "unknown widths": changed("w2_index", lambda index: index * torch.tensor([1, 0])),
    "fewer codes": changed("w13_codes", lambda codes: codes[:64]),
    "fewer scales": changed("w2_scale", lambda scale: scale[:-1]),
    "expert beyond the last": changed("topk_ids", lambda ids: ids + 8),
}


def said(call: Callable[[], object]) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "nothing"


def main() -> None:
    engine = sys.argv[1]
    compiled = engine.startswith("cpu-")
    for state, change in {**STATES, **(ACTIVATION_STATES if compiled else {})}.items():
        names = ("x", "w13", "w2", "slot_of_expert", "topk_weights", "topk_ids")
        arguments = dict(zip(names, Case().tensors(engine), strict=True))
        change(arguments)
        operator = torch.ops.vllm_puzzle.packed_moe
        print(f"{state}\t{said(lambda: operator(**arguments, activation='silu', engine=engine))}", flush=True)  # noqa: B023
    for state, change in {**CODED_STATES, **(ACTIVATION_STATES if compiled else {})}.items():
        arguments = CodedCase().named(engine)
        change(arguments)
        operator = torch.ops.vllm_puzzle.coded_moe
        print(f"coded: {state}\t{said(lambda: operator(**arguments, activation='silu', engine=engine))}", flush=True)  # noqa: B023
    if compiled:
        prepare = ENGINES[engine].prepare
        words = torch.zeros(2, 64, 32, dtype=torch.int16)
        print(f"preparing meta\t{said(lambda: prepare(words.to('meta'), words, 1, 1))}", flush=True)
        words.untyped_storage().resize_(0)
        print(f"preparing freed\t{said(lambda: prepare(words, words, 1, 1))}", flush=True)
        print(f"no memory\t{said(lambda: prepare(*Case().weights(engine), 2**45, 2))}", flush=True)
        Case().check(engine=engine)
        CodedCase().check(engine=engine)
        print("after all that\tas before")


if __name__ == "__main__":
    main()
