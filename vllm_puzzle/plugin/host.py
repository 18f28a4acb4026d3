"""What this package takes from vLLM: every import of its classes is here, so that a move is mended in one place."""

from vllm.config import VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.lora.lora_model import LoRAModel
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO
from vllm.platforms import current_platform
from vllm.transformers_utils.repo_utils import get_hf_file_bytes, get_hf_file_to_dict

# vLLM's handlers show what is logged below its own name.
logger = init_logger("vllm.plugins.puzzlemoe")

__all__ = [
    "LAYERWISE_INFO",
    "FusedMoEMethodBase",
    "LinearBase",
    "LoRAModel",
    "QuantizationConfig",
    "QuantizeMethodBase",
    "RoutedExperts",
    "UnquantizedLinearMethod",
    "VllmConfig",
    "current_platform",
    "finalize_layerwise_reload",
    "get_current_vllm_config",
    "get_hf_file_bytes",
    "get_hf_file_to_dict",
    "get_model_loader",
    "initialize_layerwise_reload",
    "logger",
    "register_quantization_config",
]
