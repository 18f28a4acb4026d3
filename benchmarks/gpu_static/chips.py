"""The GPUs that the kernels are compiled for, and how many programs fit one of their multiprocessors."""

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Chip:
    """What the programs of one multiprocessor share.

    Attributes:
        registers: 32-bit ones; on AMD those of a SIMD unit, over its lanes.
        shared_bytes: of shared memory.
        shared_reserved: bytes of shared memory that each program takes beside what it asks for.
        warps: the most that are resident.
    """

    gpu: GPUTarget
    registers: int
    shared_bytes: int
    shared_reserved: int
    warps: int

    def programs(self, registers: int, shared_bytes: int, num_warps: int) -> int:
        """How many programs are resident at once."""
        # Registers are given to warps in units of 8 a thread; AMD's four SIMDs have a file each.
        files = 4 if self.gpu.backend == "hip" else 1
        warps = files * (self.registers // (-(-registers // 8) * 8 * self.gpu.warp_size))
        by_shared_memory = self.shared_bytes // (shared_bytes + self.shared_reserved) if shared_bytes else self.warps
        return min(warps // num_warps, self.warps // num_warps, by_shared_memory)


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; CDNA 3 ISA: 512 registers a lane.
CHIPS = {
    "sm80": Chip(GPUTarget("cuda", 80, 32), 65536, 164 * 1024, 1024, 64),
    "sm89": Chip(GPUTarget("cuda", 89, 32), 65536, 100 * 1024, 1024, 48),
    "sm90": Chip(GPUTarget("cuda", 90, 32), 65536, 228 * 1024, 1024, 64),
    "sm100": Chip(GPUTarget("cuda", 100, 32), 65536, 228 * 1024, 1024, 64),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 512 * 64, 64 * 1024, 0, 32),
}
