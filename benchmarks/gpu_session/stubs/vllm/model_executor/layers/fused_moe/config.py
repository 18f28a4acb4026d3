import torch

FUSED_MOE_UNQUANTIZED_CONFIG = None


class FusedMoEQuantConfig:
    pass


def _get_config_dtype_str(dtype: torch.dtype, use_fp8_w8a8: bool = False, **options: object) -> str | None:
    return "fp8_w8a8" if use_fp8_w8a8 else None
