"""The methods that options leave open for a model."""

from ..checkpoints.shape import MoEShape
from ..defaults import DEFAULT_COMPRESSION
from .code_method import CodeMethod
from .method import Method
from .options import ConvertOptions
from .pair_method import PairMethod
from .pairing import budget_pairs


def open_methods(options: ConvertOptions, shape: MoEShape) -> tuple[Method, ...]:
    """What `options` leave open, the best one first.

    Raises:
        CheckpointError: the model's experts cannot be paired as the options want it.
    """
    if options.bits is not None:
        return (CodeMethod(options.bits, options.even, options.calibration is not None),)
    compression = DEFAULT_COMPRESSION if options.compression is None else options.compression
    budget = budget_pairs(shape.num_experts, len(shape.moe_layers), compression, options.max_expert_parallel)
    return tuple(PairMethod(recipe, budget, compression) for recipe in options.recipes())
