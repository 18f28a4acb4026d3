"""The entry point `vllm.general_plugins: puzzlemoe`, which vLLM calls once in each of its processes."""

import logging

from .versions import UnsupportedVLLMError, check_vllm


def register() -> None:
    """Makes `puzzlemoe` known to vLLM as a quantization method; calling it again changes nothing.

    A vLLM of an unsupported version is left as it was, with an error in its log: raising here would take down every
    model it serves, not ours alone.

    Raises:
        ModuleNotFoundError: there is no vLLM; the message says what to install.
    """
    try:
        check_vllm()
    except UnsupportedVLLMError as error:
        logging.getLogger("vllm.plugins.puzzlemoe").error("puzzlemoe was not registered: %s", error)
        return
    from .config import PuzzleMoEConfig
    from .host import current_platform, register_quantization_config

    register_quantization_config("puzzlemoe")(PuzzleMoEConfig)
    if current_platform.is_cpu():
        _permit_amx()


def _permit_amx() -> None:
    """Asks the kernel for AMX tile permission, without which vLLM's CPU attention dies of an illegal instruction.

    Linux grants the tiles per process and on request; vLLM 0.32 uses them in attention without having asked.
    """
    import torch

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
