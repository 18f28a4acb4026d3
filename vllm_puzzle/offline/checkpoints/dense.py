"""What a checkpoint has beside its routed experts: all that transformers' own model of its config needs."""

from collections.abc import Mapping
from typing import Any

from vllm_puzzle.format import FormatError
from vllm_puzzle.model_tensors import check_dense_tensors, dense_tensors, empty_model, is_defined

from ..errors import CheckpointError
from .families import FAMILIES
from .shape import MoEShape


def build_model(config: Any, where: object) -> Any:
    """transformers' own model of a PretrainedConfig without weights, see `empty_model`.

    None where transformers has no model of an architecture that is not declared. `where` is the path of the config.

    Raises:
        CheckpointError: transformers cannot build it.
    """
    if not is_defined(config) and not FAMILIES.keys() & set(config.architectures or []):
        return None
    try:
        return empty_model(config, str(where))
    except FormatError as error:
        raise CheckpointError(str(error)) from None


def check_dense(
    found: Mapping[str, tuple[int, ...] | None], model: Any, shape: MoEShape, where: object, mend: str
) -> None:
    """Raises CheckpointError where a tensor that `model` needs outside its routed experts is missing or misshapen.

    Nothing is known where there is no model.

    Args:
        found: the shapes of the checkpoint's tensors by their names on the hub, None where only the name is known.
        model: of the checkpoint's config, see `build_model`; None where there is none.
        where: what an error message calls the checkpoint; `mend` is what it advises.
    """
    if model is None:
        return
    try:
        check_dense_tensors(found, dense_tensors(model, shape.moe_layers), str(where), mend)
    except FormatError as error:
        raise CheckpointError(str(error)) from None
