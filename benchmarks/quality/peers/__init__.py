"""The methods that merging is compared with: each makes one MoE layer's experts smaller, most of them by half."""

from benchmarks.quality.round_to_nearest import GROUP_SIZE

from .base import CompressedLayer, LoggedTokens, Method, Peer
from .dropping import drop_least_frequent, reap
from .merging import hc_smoe, m_smoe, sub_moe
from .pruning import sparsegpt, wanda
from .rounding import fp8, int4
from .saliency import magnitude_saliency, random_saliency

__all__ = ["PEERS", "CompressedLayer", "LoggedTokens", "Method", "Peer"]

# Half of the weights in 16 bits each, and for every weight a bit that says whether it is there.
_SPARSE_BITS = 16 / 2 + 1
# Half of the experts in 16 bits; which expert is in which cluster takes no room beside them.
_HALF_BITS = 16 / 2

PEERS: dict[str, Peer] = {
    "magnitude": Peer(
        "paper's rule, magnitude saliency", _HALF_BITS, magnitude_saliency, "ablation of arXiv 2511.04805", False
    ),
    "random": Peer("paper's rule, random saliency", _HALF_BITS, random_saliency, "ablation of arXiv 2511.04805", False),
    "wanda": Peer("Wanda 50 %", _SPARSE_BITS, wanda, "arXiv 2306.11695", needs_calibration=True, sequential=True),
    "sparsegpt": Peer("SparseGPT 50 %", _SPARSE_BITS, sparsegpt, "arXiv 2301.00774", True, sequential=True),
    "reap": Peer("REAP 50 %", _HALF_BITS, reap, "arXiv 2510.13999", needs_calibration=True),
    "frequency": Peer(
        "Frequency 50 %", _HALF_BITS, drop_least_frequent, "baseline in arXiv 2510.13999", needs_calibration=True
    ),
    "hc-smoe": Peer("HC-SMoE 50 %", _HALF_BITS, hc_smoe, "arXiv 2410.08589", needs_calibration=True),
    "m-smoe": Peer("M-SMoE 50 %", _HALF_BITS, m_smoe, "arXiv 2310.01334", needs_calibration=True),
    "sub-moe": Peer("Sub-MoE 50 %", _HALF_BITS, sub_moe, "arXiv 2506.23266", needs_calibration=True),
    # One float32 scale per row of some hundred or thousand weights is below what the table shows.
    "fp8": Peer("FP8 e4m3", 8.0, fp8, "round to nearest", needs_calibration=False),
    "int4": Peer("INT4", 4 + 16 / GROUP_SIZE, int4, "round to nearest", needs_calibration=False),
}
