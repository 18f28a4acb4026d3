"""What `vllm-puzzle plan` prints."""

from ..wording import size
from .sizing import GIB, Conversion, Fit, Sizing
from .tables import aligned

_TEMPLATE = """\
{sizing.model}: {sizing.architecture}, {sizing.num_hidden_layers} layers, {sizing.moe_layers} of them with \
{sizing.num_experts} experts of 3 x {sizing.intermediate_size} x {sizing.hidden_size} weights, {sizing.top_k} a token
{form}; sizes from {read_from}

{sizes}

KV cache in BF16: {kv_per_token} a token, {context_gib:.2f} GiB for a context of \
{sizing.context:,} tokens

{cards}

The fewest cards, a power of two, that hold the weights and one sequence of that context in {percent:g} % of their
memory; "-" where no number that the model can be split over does. KV is what is left for the KV cache on all of them
together; activations and CUDA graphs take some of it.

Converting on this machine's CPU, an estimate:
{conversions}"""

_READ_FROM = {"headers": "the tensors' headers", "index": "the index's total and the config, as shards are missing"}


def describe_sizing(sizing: Sizing) -> str:
    """The text for a terminal; ends without a newline."""
    sizes = [
        ["size", "as it is", "packed", ""],
        _sizes_row("routed experts", sizing.expert_bytes_before, sizing.expert_bytes_after),
        _sizes_row("everything else", sizing.other_bytes_before, sizing.other_bytes_after),
        _sizes_row("total", sizing.total_bytes_before, sizing.total_bytes_after),
    ]
    cards = [["fits on", "GiB each", "as it is: cards", "KV GiB", "KV tokens", "packed: cards", "KV GiB", "KV tokens"]]
    cards += [
        [each.card, f"{each.memory_gib:.1f}", *_fit_cells(each.before), *_fit_cells(each.after)]
        for each in sizing.cards
    ]
    return _TEMPLATE.format(
        sizing=sizing,
        form=_form(sizing),
        read_from=_READ_FROM[sizing.read_from],
        sizes=aligned(sizes),
        kv_per_token=size(sizing.kv_bytes_per_token),
        context_gib=sizing.kv_bytes_of_context / GIB,
        cards=aligned(cards),
        percent=100 * sizing.gpu_memory_utilization,
        conversions="\n".join(_conversion(each) for each in sizing.conversions),
    )


def _form(sizing: Sizing) -> str:
    if sizing.bits is None:
        return f"{sizing.pairs} pairs at {sizing.compression:g} %"
    return f"codes of {sizing.bits:g} bits a weight"


def _sizes_row(name: str, before: int, after: int) -> list[str]:
    return [name, size(before), size(after), "" if before == after else f"{after / before:.1%}"]


def _fit_cells(fit: Fit | None) -> list[str]:
    return ["-", "", ""] if fit is None else [str(fit.cards), f"{fit.kv_gib:.1f}", f"{fit.kv_tokens:,}"]


def _conversion(conversion: Conversion) -> str:
    tokens = conversion.calibration_tokens
    text = f"with {tokens:,} tokens of calibration text" if tokens else "without calibration"
    return f"  {text}: rule {conversion.rule}{', aligned' if conversion.align else ''}, {conversion.estimate}"
