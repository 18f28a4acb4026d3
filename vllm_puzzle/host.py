"""What this package takes from vLLM: every import of its classes stands here, so that a move there is mended once."""

from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform
from vllm.transformers_utils.repo_utils import get_hf_file_bytes

# vLLM's handlers show what is logged below its own name.
logger = init_logger("vllm.plugins.puzzlemoe")

__all__ = [
    "FusedMoEMethodBase",
    "LinearBase",
    "QuantizationConfig",
    "QuantizeMethodBase",
    "RoutedExperts",
    "UnquantizedLinearMethod",
    "current_platform",
    "get_current_vllm_config",
    "get_hf_file_bytes",
    "logger",
    "register_quantization_config",
    "set_weight_attrs",
]
