import torch


class _Cuda:
    dispatch_key = "CUDA"

    def is_rocm(self) -> bool:
        return False

    is_xpu = is_cpu = is_rocm

    def is_cuda(self) -> bool:
        return True

    is_cuda_alike = is_cuda

    def fp8_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn

    def is_device_capability(self, capability: int) -> bool:
        # Where kernels are compiled for an H100 that is not here, it is asked about that.
        major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
        return major * 10 + minor == capability


current_platform = _Cuda()
