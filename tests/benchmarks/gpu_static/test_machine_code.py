"""Counts of machine code: listings counted by hand, and kernels that differ by known instructions.

Run as a program, it compiles the kernel and prints its counts: where TRITON_INTERPRET is set, none can be compiled.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_static.machine_code import Loop, MachineCodeError, parse_sass, read_amdgcn, read_cubin

RESOURCES = " Function kernel:\n  REG:40 STACK:8 SHARED:0 LOCAL:16 CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0\n"

# Two back edges lead to .L_x_1, one of them a computed jump; the wait at .L_x_3 spins, the one at .L_x_7 out of line;
# .L_x_4 is left by a call of a label. What follows .L_x_9 pads the code and is never reached.
SASS = """
kernel:
  S2R R0, SR_TID.X; @!P0 BRA `(.L_x_4)
.L_x_1:
  IMAD.MOV.U32 R1, RZ, RZ, R0; @P1 LOP3.LUT R2, R1, 0xff, RZ, 0xc0, !PT; UIADD3 UR4, UR4, 0x1, URZ; R2UR UR5, R2
  UTMALDG.2D [UR8], [UR4]; LDGSTS.E.BYPASS.LTC128B.128 [R4], [R6.64]; @P2 LDGSTS.E.64 [R4+0x80], [R6.64]
  LDGSTS.E [R4+0x90], [R6.64]; LDG.E.U16 R9, [R6.64]
  BSSY B0, `(.L_x_2); @P3 BRA `(.L_x_2); STL.64 [R1], R2; BSYNC B0
.L_x_2:
  STS.128 [R4], R8
.L_x_3:
  SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2; @!P0 BRA `(.L_x_3)
  HFMA2.BF16_V2 R3, R2, R2, -RZ; HMMA.16816.F32.BF16 R12, R8, R2, R12; SYNCS.PHASECHK P0, [UR6], R2; @!P0 BRA `(.L_x_7)
.L_x_8:
  BRA.U UP0, `(.L_x_1); FADD R5, R5, R5; BRX R2 -0x1a0 (*"BRANCH_TARGETS .L_x_1,.L_x_4"*)
.L_x_4:
  VIADD R3, R3, 0x1; CALL.REL.NOINC `($slow); @P0 CALL.REL.NOINC `(.L_x_5); BRA `(.L_x_4)
.L_x_5:
  EXIT
.L_x_7:
  SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR6], R2; @!P0 BRA `(.L_x_7); BRA `(.L_x_8)
$slow:
.L_x_6:
  IADD3 R1, R1, R1, RZ; @P0 BRA `(.L_x_6); RET.REL.NODEC R2 `(kernel)
.L_x_9:
  BRA `(.L_x_9)
"""

AMDGCN = """
kernel:                                 ; @kernel
.LBB0_1:                                ; =>This Loop Header: Depth=1
\tv_and_or_b32 v4, v0, 63, s9           ; v_mov_b32
\tv_pk_lshlrev_b16 v1, 4, v0
\tv_cmp_gt_i32_e32 vcc, 0, v1
\tv_cndmask_b32_e64 v1, v2, v3, vcc
\tv_cvt_f32_u32_e32 v6, v1
\tv_pk_fma_f16 v7, v6, v6, v6
\ts_lshl_b64 s[12:13], s[12:13], 1
\tglobal_load_dwordx4 v[24:27], v[20:21], off
\tbuffer_load_ushort v8, v1, s[4:7], 0 offen
\tbuffer_load_dwordx4 v1, s[4:7], 0 offen lds
\tglobal_load_lds_dword v[2:3], off
\tbuffer_load_dword v2, off, s[20:23], 0 offset:4 ; 4-byte Folded Reload
\tds_write_b64 v2, v[24:25]
\tv_mfma_f32_16x16x16_f16 v[2:5], v[30:31], v[22:23], v[2:5]
.LBB0_2:                                ;   Parent Loop BB0_1 Depth=1
\ts_cbranch_execnz .LBB0_2
\ts_cbranch_scc1 .LBB0_1
\tscratch_store_dword off, v1, off
\ts_endpgm
\t.amdgpu_metadata
amdhsa.kernels:
  - .private_segment_fixed_size: 16
    .sgpr_spill_count: 1
    .vgpr_count:     36
    .vgpr_spill_count: 2
"""


def in_alus(loop: Loop) -> tuple[int, ...]:
    return loop.issued, loop.integer, loop.uniform, loop.half, loop.tensor


def numbered(listing: str) -> str:
    """One instruction per line behind an address, as nvdisasm prints it; labels as they are."""
    lines = [line for text in listing.splitlines() for line in (text.split(";") if text.startswith(" ") else [text])]
    return "\n".join(f" /*{16 * i:04x}*/ {line} ;" if line.startswith(" ") else line for i, line in enumerate(lines))


def test_sass_counted_by_hand() -> None:
    code = parse_sass(numbered(SASS), RESOURCES)
    assert (code.registers, code.spill_bytes, code.local_accesses) == (40, 24, 1)
    main, spin, tail, late_spin, slow = code.loops
    assert code.main_loops == (main,)
    # The jump back from the wait that is out of line is issued too.
    assert in_alus(main) == (22, 2, 2, 1, 1)
    assert main.asynchronous_copies == {0: 1, 4: 1, 8: 1, 16: 1}
    assert (main.global_loads, main.shared_stores) == ({2: 1}, 1)
    assert [in_alus(loop)[:2] for loop in (spin, tail, late_spin, slow)] == [(2, 0), (4, 1), (2, 0), (2, 1)]


def test_amdgcn_counted_by_hand() -> None:
    code = read_amdgcn(AMDGCN)
    assert (code.registers, code.spill_bytes, code.local_accesses) == (36, 28, 2)
    main, spin = code.loops
    assert code.main_loops == (main,)
    assert (in_alus(main), spin.issued) == ((15, 4, 1, 1, 1), 1)
    assert main.asynchronous_copies == {4: 1, 16: 1}
    assert (main.global_loads, main.shared_stores) == ({2: 1, 16: 1}, 1)


def test_what_cannot_be_read_is_an_error() -> None:
    entered_twice = "  @P0 BRA `(.L_x_2)\n.L_x_1:\n  FADD R0, R0, R0\n.L_x_2:\n  BRA `(.L_x_1)"
    with pytest.raises(MachineCodeError, match="entered in several places"):
        parse_sass(numbered(entered_twice), RESOURCES)
    with pytest.raises(MachineCodeError, match="no instructions"):
        parse_sass("", RESOURCES)
    with pytest.raises(MachineCodeError, match="describes no kernel"):
        read_amdgcn("")
    pytest.importorskip("triton")
    with pytest.raises(MachineCodeError, match="nvdisasm failed"):
        read_cubin(b"no cubin")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The counts of this file's kernel, by target and variant."""
    pytest.importorskip("triton")
    unset = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = {**unset, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    command = [sys.executable, "-m", "tests.benchmarks.gpu_static.test_machine_code"]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("target", "tensor"), [("80", 4), ("90", 2)])
def test_instructions_added_to_a_loop_are_counted(compiled: Any, target: str, tensor: int) -> None:
    (once,), (more,) = (compiled[f"{target}, {permutes} permutes"]["main_loops"] for permutes in (1, 4))
    (issued, integer, *others), copies, loads = once
    # 64 x 32 words of 16 bits over 128 threads are 8 registers of a thread.
    assert more == [[issued + 3 * 8, integer + 3 * 8, *others], copies, loads]
    # HMMA takes 16 x 8 x 16 of a warp's 16 x 16 x 32, HGMMA 64 x 16 x 16 of a warpgroup's 64 x 16 x 32.
    assert others[-1] == tensor
    # A thread copies 16 of the words and 4 of the activations.
    assert (copies, loads) == ({"8": 1, "16": 2}, {})


def test_waits_for_the_tensor_core_are_loops_of_their_own(compiled: Any) -> None:
    assert len(compiled["100, 1 permutes"]["main_loops"]) == 1 < compiled["100, 1 permutes"]["num_loops"]


def test_spills_are_counted(compiled: Any) -> None:
    for name, code in compiled.items():
        assert [count > 0 for count in code["needs"]] == [True, name == "80, 32 registers", name == "80, 32 registers"]
    assert compiled["80, 32 registers"]["needs"][0] <= 32


def test_a_kernel_for_amd(compiled: Any) -> None:
    ((counts, _, loads),) = compiled["gfx942"]["main_loops"]
    # An MFMA takes 16 x 16 x 16 of a wave's 16 x 16 x 32.
    assert counts[-1] == 2
    assert loads == {"4": 1, "16": 1}


if __name__ == "__main__":
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    @triton.jit
    def product(words, x, out, k, n: tl.constexpr, asm: tl.constexpr):
        row, column, inner = tl.arange(0, 64), tl.arange(0, n), tl.arange(0, 32)
        total = tl.zeros((64, n), tl.float32)
        for start in tl.range(0, k, 32, num_stages=3):
            a = tl.load(words + row[:, None] * k + inner[None, :] + start)
            if asm != "":
                a = tl.inline_asm_elementwise(asm, "=r,r", [a], dtype=tl.int16, is_pure=True, pack=2)
            b = tl.load(x + column[None, :] * k + inner[:, None] + start)
            total = tl.dot(a.to(tl.float16, bitcast=True), b, total)
        tl.store(out + row[:, None] * n + column[None, :], total)

    def build(target: GPUTarget, n: int, permutes: int, **options: int) -> dict[str, Any]:
        types = {"words": "*i16", "x": "*fp16", "out": "*fp32", "k": "i32", "n": "constexpr", "asm": "constexpr"}
        # Selectors and sources that are data, so that ptxas can fold nothing.
        asm = "\n".join(["prmt.b32 $0, $1, $1, $1;", *["prmt.b32 $0, $0, $0, $0;"] * (permutes - 1)] * (permutes > 0))
        aligned = {(argument,): [["tt.divisibility", 16]] for argument in range(4)}
        source = ASTSource(product, types, {(4,): n, (5,): asm}, aligned)
        binary = triton.compile(source, target=target, options=options).asm
        code = read_amdgcn(binary["amdgcn"]) if target.backend == "hip" else read_cubin(binary["cubin"])
        needs = code.registers, code.spill_bytes, code.local_accesses
        loops = [(in_alus(loop), loop.asynchronous_copies, loop.global_loads) for loop in code.main_loops]
        return {"needs": needs, "num_loops": len(code.loops), "main_loops": loops}

    variants = [(80, 1), (80, 4), (90, 1), (90, 4), (100, 1)]
    nvidia = {f"{arch}, {count} permutes": build(GPUTarget("cuda", arch, 32), 16, count) for arch, count in variants}
    nvidia["80, 32 registers"] = build(GPUTarget("cuda", 80, 32), 128, 0, maxnreg=32)
    print(json.dumps({**nvidia, "gfx942": build(GPUTarget("hip", "gfx942", 64), 16, 0)}))
