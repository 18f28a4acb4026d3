"""Which vLLM this package works with, and what a user is told who has another one or none."""

from packaging.specifiers import SpecifierSet

SUPPORTED_VLLM = SpecifierSet(">=0.32,<0.34")

_INSTALL = "install 'vllm-puzzle[cuda]' for CUDA or 'vllm-puzzle[cpu]' for machines without a GPU, never both"


class UnsupportedVLLMError(ImportError):
    """The installed vLLM is of a version that this package does not work with."""


def check_vllm() -> None:
    """Raises ModuleNotFoundError where vLLM is missing, UnsupportedVLLMError where its version is not supported."""
    try:
        import vllm
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise ModuleNotFoundError(
            f"vllm-puzzle serves through vLLM {SUPPORTED_VLLM}, which is not installed; {_INSTALL}", name="vllm"
        ) from None
    if not SUPPORTED_VLLM.contains(vllm.__version__, prereleases=True):
        raise UnsupportedVLLMError(
            f"vllm-puzzle supports vLLM {SUPPORTED_VLLM} and found {vllm.__version__}; {_INSTALL}"
        )
