"""Finding how the products are cut: a file tuned for the device and the shape, or else defaults for its family.

Tuned files are found as those of vLLM's own `fused_moe` kernel, in $VLLM_TUNED_CONFIG_FOLDER and then among this
package's own, under names that `file_name` makes. They map numbers of tokens to configurations, and the nearest is
taken. A default file, `{family}.json`, maps mean numbers of tokens per expert to configurations, of which the first
that suffices is taken; its sums are split as far as enough programs ask for.
"""

import logging
import os
import re
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from ...format import Strict
from ..errors import EngineError
from .target import Target

# Each number of parts is a kernel of its own.
MOST_PARTS = 8
FOLDER = Path(__file__).with_name("configs")
_logger = logging.getLogger("vllm.plugins.puzzlemoe")


def _is_power_of_two(value: int) -> int:
    if value < 1 or value & (value - 1):
        raise ValueError(f"{value} is not a power of two")
    return value


PowerOfTwo = Annotated[int, AfterValidator(_is_power_of_two)]


class Product(Strict):
    """How one of the two products is cut; see `tiles.Tile`."""

    block_rows: Annotated[PowerOfTwo, Field(ge=16)]
    block_k: Annotated[PowerOfTwo, Field(ge=16)]
    split_k: Annotated[int, Field(ge=1)] = 1
    num_warps: PowerOfTwo
    num_stages: Annotated[int, Field(ge=1)]
    programs_per_sm: Annotated[int, Field(ge=1)] = 1
    """How many programs fit a multiprocessor at once; sums are split until there are so many."""


class Config(Strict):
    """How one call is cut; see `tiles.Tile`."""

    members: Literal[1, 2]
    block_tokens: Annotated[PowerOfTwo, Field(ge=8)]
    weights_first: bool
    gate_up: Product
    down: Product


class CallSizes(NamedTuple):
    """What decides how a call is cut, beside the target.

    Attributes:
        num_experts: of the layer on this rank.
        num_slots: that hold them, of pairs and of single experts.
        intermediate_size: this rank's part.
        top_k: the experts of a token.
        num_tokens: of the call, not zero.
    """

    num_experts: int
    num_slots: int
    hidden_size: int
    intermediate_size: int
    top_k: int
    num_tokens: int


_FILE = TypeAdapter(dict[Annotated[int, Field(ge=1, strict=False)], Config])


@cache
def load_configs(path: Path) -> dict[int, Config]:
    """The configurations of a file, by rising key.

    Raises:
        EngineError: it cannot be read or breaks the schema.
    """
    try:
        configs = _FILE.validate_json(path.read_bytes())
    except OSError as error:
        raise EngineError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise EngineError(
            f"{path} is not a file of tile configurations: {where}: {first['msg']}; remove it or tune again"
        ) from None
    if not configs:
        raise EngineError(f"{path} holds no tile configuration; remove it or tune again")
    return dict(sorted(configs.items()))


def file_name(num_experts: int, intermediate_size: int, device_name: str) -> str:
    """The name of a tuned file: vLLM's pattern in letters, digits, `.`, `-` and `_`, which every file system takes.

    Args:
        intermediate_size: this rank's part.
        device_name: as the driver gives it; whatever it has beside these characters becomes `_`.
    """
    name = re.sub(r"[^A-Za-z0-9.-]+", "_", device_name).strip("_")
    return f"E-{num_experts}_N-{intermediate_size}_device_name-{name}_dtype-puzzlemoe.json"


@cache
def find_config(target: Target, sizes: CallSizes) -> Config:
    """The configuration for a call: the tuned one whose number of tokens is nearest, or else the default.

    Raises:
        EngineError: a file was found and is not valid.
    """
    tuned = _find_tuned(file_name(sizes.num_experts, sizes.intermediate_size, target.device_name))
    if tuned is not None:
        return tuned[min(tuned, key=lambda key: abs(key - sizes.num_tokens))]
    return default_config(target, sizes)


def default_config(target: Target, sizes: CallSizes) -> Config:
    """The configuration that `find_config` returns where nothing was tuned."""
    defaults = load_configs(FOLDER / f"{target.family}.json")
    num_choices = sizes.num_tokens * sizes.top_k
    tokens_per_expert = num_choices / sizes.num_experts
    key = next((key for key in defaults if key >= tokens_per_expert), max(defaults))
    config = defaults[key]
    # Few choices go to as many slots, many fill blocks.
    blocks = max(min(sizes.num_slots, num_choices), num_choices // (config.members * config.block_tokens))
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    gate_up = _split(config.gate_up, hidden, -(-2 * inner // config.gate_up.block_rows) * blocks, target)
    down = _split(config.down, inner, -(-hidden // config.down.block_rows) * blocks, target)
    return config.model_copy(update={"gate_up": gate_up, "down": down})


@cache
def _find_tuned(name: str) -> dict[int, Config] | None:
    user_folder = os.environ.get("VLLM_TUNED_CONFIG_FOLDER")
    for folder in ([Path(user_folder)] if user_folder else []) + [FOLDER]:
        if (folder / name).is_file():
            _logger.info("The triton engine's tiles come from %s.", folder / name)
            return load_configs(folder / name)
    _logger.info("The triton engine's tiles are defaults, nobody tuned them: %s was not found.", name)
    return None


def _split(product: Product, k: int, programs: int, target: Target) -> Product:
    """Splits a sum into equal parts, of two steps at least, until all multiprocessors are full."""
    steps = -(-k // product.block_k)
    parts = [parts for parts in range(1, min(steps // 2, MOST_PARTS) + 1) if steps % parts == 0] or [1]
    enough = (count for count in parts if count * programs >= product.programs_per_sm * target.num_sms)
    return product.model_copy(update={"split_k": next(enough, parts[-1])})
