"""The methods that merging is compared with: each makes one MoE layer's experts smaller, most of them by half."""

from collections.abc import Iterator

from benchmarks.quality.round_to_nearest import GROUP_SIZE

from .base import CompressedLayer, LoggedTokens, Method, Peer, in_float32
from .dropping import drop_least_frequent, reap
from .integers import integers, mixed_integers
from .levels import fitted_levels
from .merging import hc_smoe, m_smoe, sub_moe
from .pruning import sparsegpt, wanda
from .rays import quantized_rays
from .rounding import fp8, int4
from .saliency import magnitude_saliency, random_saliency

__all__ = ["PEERS", "CompressedLayer", "LoggedTokens", "Method", "Peer", "in_float32"]

# Half of the weights in 16 bits each, and for every weight a bit that says whether it is there.
_SPARSE_BITS = 16 / 2 + 1
# Half of the experts in 16 bits; which expert is in which cluster takes no room beside them.
_HALF_BITS = 16 / 2
# For gate and up, and for down. 6 and 5 levels take 2.5 bits a weight together, two thirds being gate and up.
_LEVELS = {"2": (4, 4), "2.5": (6, 5), "3": (8, 8), "4": (16, 16)}

PEERS: dict[str, Peer] = {
    "magnitude": Peer(
        "paper's rule, magnitude saliency", _HALF_BITS, magnitude_saliency, "ablation of arXiv 2511.04805"
    ),
    "random": Peer("paper's rule, random saliency", _HALF_BITS, random_saliency, "ablation of arXiv 2511.04805"),
    "wanda": Peer("Wanda 50 %", _SPARSE_BITS, wanda, "arXiv 2306.11695", sequential=True),
    "sparsegpt": Peer("SparseGPT 50 %", _SPARSE_BITS, sparsegpt, "arXiv 2301.00774", sequential=True),
    "reap": Peer("REAP 50 %", _HALF_BITS, reap, "arXiv 2510.13999"),
    "frequency": Peer("Frequency 50 %", _HALF_BITS, drop_least_frequent, "baseline in arXiv 2510.13999"),
    "hc-smoe": Peer("HC-SMoE 50 %", _HALF_BITS, hc_smoe, "arXiv 2410.08589"),
    "m-smoe": Peer("M-SMoE 50 %", _HALF_BITS, m_smoe, "arXiv 2310.01334"),
    "sub-moe": Peer("Sub-MoE 50 %", _HALF_BITS, sub_moe, "arXiv 2506.23266"),
    # One float32 scale per row of some hundred or thousand weights is below what the table shows.
    "fp8": Peer("FP8 e4m3", 8.0, fp8, "round to nearest"),
    "int4": Peer("INT4", 4 + 16 / GROUP_SIZE, int4, "round to nearest"),
}


def _with_fewer_bits() -> Iterator[tuple[str, Peer]]:
    for bits in (2, 3, 4):
        for suffix, symmetric in (("", True), (" asymmetric", False)):
            slug = f"{bits}{suffix.replace(' ', '-')}"
            yield (
                f"rtn-int{slug}",
                Peer(f"RTN INT{bits}{suffix}", None, integers(bits, symmetric, compensated=False), "round to nearest"),
            )
            yield (
                f"gptq-int{slug}",
                Peer(f"GPTQ INT{bits}{suffix}", None, integers(bits, symmetric, compensated=True), "arXiv 2210.17323"),
            )
    for name, num_levels in _LEVELS.items():
        levels = fitted_levels(num_levels)
        yield f"levels-{name}", Peer(f"fitted levels, {name} bits", None, levels, "scalar codebooks after GPTQ")
    yield "mc-moe", Peer("MC-MoE, mixed INT 2.5", None, mixed_integers(2.5, (1, 2, 3)), "arXiv 2410.06270")
    for name, width in (("2", 4), ("2.5", 5), ("3", 6)):
        rays = quantized_rays(width)
        yield f"rays-{name}", Peer(f"paper's rays, {name} bits", None, rays, "arXiv 2511.04805 with quantization")


PEERS.update(_with_fewer_bits())
