"""Checking what a checkpoint holds beside its routed experts: all that the model of its config needs."""

from collections.abc import Mapping
from typing import Any

from vllm_puzzle.format import FormatError
from vllm_puzzle.model_tensors import check_dense_tensors, dense_tensors

from ..errors import CheckpointError
from .families import MoEShape


def check_dense(
    found: Mapping[str, tuple[int, ...] | None], config: Any, shape: MoEShape, where: object, mend: str
) -> None:
    """Raises CheckpointError where one is missing or misshapen, or transformers cannot build the model.

    Args:
        found: the shapes of the checkpoint's tensors by their names on the hub, None where only the name is known.
        where: what an error message calls the checkpoint; `mend` is what it advises.
    """
    try:
        check_dense_tensors(found, dense_tensors(config, shape.moe_layers), str(where), mend)
    except FormatError as error:
        raise CheckpointError(str(error)) from None
