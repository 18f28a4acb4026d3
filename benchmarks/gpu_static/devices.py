"""Peak figures of GPUs, from their vendors' data sheets and whitepapers, for the model in `roofline`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Peak figures of one GPU; a multiprocessor (SM) is a compute unit (CU) on AMD.

    `target` is what Triton compiles for: NVIDIA's compute capability times ten, or AMD's architecture.
    `clock_ghz` is the clock at which the vendor states `bf16_tflops`, on NVIDIA often below the highest boost clock.
    Lanes are thread-level instructions per clock and SM: `alu_lanes` of 32-bit integer instructions, `half_lanes` of
    packed 16x2 ones (bf16x2), each of which yields two results. `schedulers` is warp instructions issued per clock and
    SM. `bf16_tflops` is dense, without sparsity.
    """

    name: str
    target: int | str
    num_sms: int
    clock_ghz: float
    hbm_gb_per_s: float
    bf16_tflops: float
    alu_lanes: int
    half_lanes: int
    schedulers: int
    warp_size: int


# NVIDIA's lanes are those of the arithmetic throughput table in the CUDA C++ Programming Guide; they agree with the
# whitepapers' peak rates without tensor cores, worked out below. Schedulers: four an SM, same guide.
DEVICES = (
    # A100 80GB data sheet and A100 whitepaper: 312 TFLOPS = 108 SMs * 2048 * 1.41 GHz. BF16 without tensor cores is
    # 39 TFLOPS = 108 * 64 lanes * 2 results * 2 flops * 1.41, half of FP16's 78.
    Device("A100-80G SXM", 80, 108, 1.41, 2039, 312, alu_lanes=64, half_lanes=64, schedulers=4, warp_size=32),
    # H100 data sheet and whitepaper: 989.4 TFLOPS = 132 SMs * 4096 * 1.83 GHz. Without tensor cores the clock is 1.98:
    # BF16 133.8 TFLOPS = 132 * 128 lanes * 2 * 2 * 1.98, INT32 33.5 TOPS = 132 * 64 lanes * 2 * 1.98.
    Device("H100 SXM", 90, 132, 1.83, 3352, 989.4, alu_lanes=64, half_lanes=128, schedulers=4, warp_size=32),
    # H200 data sheet: H100's chip with faster memory.
    Device("H200 SXM", 90, 132, 1.83, 4800, 989.4, alu_lanes=64, half_lanes=128, schedulers=4, warp_size=32),
    # DGX B200 data sheet: 64 TB/s for eight GPUs; others give 7.7 TB/s each, which would be easier to decode behind.
    # 2250 TFLOPS = 148 SMs * 8192 * 1.855 GHz gives the clock. Lanes are Hopper's: Blackwell is said to have 128 for
    # integers, but not whether logic, shift and permute instructions run on all of them.
    Device("B200 SXM", 100, 148, 1.855, 8000, 2250, alu_lanes=64, half_lanes=128, schedulers=4, warp_size=32),
    # MI300X data sheet: 1307.4 TFLOPS = 304 CUs * 2048 * 2.1 GHz. CDNA 3 whitepaper and ROCm documentation: of the four
    # 16-wide SIMDs of a CU one takes a vector instruction of a 64-wide wave at each clock. Scalar and memory
    # instructions issue beside it, so one slot for all is fewer than there are. Packed arithmetic is FP16 only:
    # BF16 arithmetic is several integer or FP32 instructions.
    Device("MI300X", "gfx942", 304, 2.1, 5300, 1307.4, alu_lanes=64, half_lanes=64, schedulers=1, warp_size=64),
)
