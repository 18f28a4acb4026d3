"""Counts in the machine code of a compiled Triton kernel: what a main loop issues, registers, spills, copies.

A kernel can be compiled ahead of time for a GPU that is not there, and its machine code read. A count is the static
count of one trip through a loop's body, for one thread. A predicated instruction counts as one since it takes an issue
slot whether or not it takes effect; both sides of a branch count, and so does code moved to the end of the kernel that
comes back into the body. A function that the body calls does not, nor a loop nested in it, such as a wait that spins;
but loops with one header are one, so that a wait at the very start of a body counts, once. Counts are no times: pipes
differ in rate, and ptxas moves work between them (IMAD.MOV for MOV).
"""

import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import networkx as nx  # type: ignore[import-untyped, unused-ignore]

Kind = Literal["tensor", "half", "async copy", "global load", "shared store", "local access", "uniform", "integer"]

# The class of an instruction is the first whose pattern matches its text up to the end of a word. Without one, it is
# only issued: float32 arithmetic, conversions, barriers, branches, votes, loads from other memory, global stores.
SASS_CLASSES: dict[Kind, str] = {
    # MMA of a warp, HGMMA and the like of a warpgroup, UTCHMMA and the like of tensor memory.
    "tensor": r"[BDHIOQ]G?MMA|UTC\w*MMA",
    # ptxas also loads constants with HFMA2 and widens float16 with HADD2.F32; they take the same pipe.
    "half": r"H(ADD|FMA|MUL|MNMX)2(_32I)?",
    "async copy": r"LDGSTS|UTMALDG|UBLKCP",
    "global load": r"LDG",
    "shared store": r"STSM?",
    "local access": r"LDL|STL",
    # Arithmetic and moves of the uniform datapath, once per warp. Its loads (ULDC, LDCU, S2UR) and votes are left out.
    "uniform": (
        r"R2UR|UR2UP|UP2UR|U(BMSK|BREV|CLEA|FLO|IABS|IADD|IADD3|IMAD|IMNMX|ISETP|LEA|LOP|LOP3|LOP32I|MOV|PLOP3|POPC"
        r"|PRMT|PSETP|SEL|SGXT|SHF|VIADD|VIMNMX)"
    ),
    # Integer, logic, predicate logic and moves per thread, IMAD in all its forms included though it is no ALU's.
    "integer": (
        r"BFE|BFI|BMSK|BREV|FLO|IABS|IADD|IADD3|IADD32I|IDP|IMAD|IMNMX|IMUL|ISCADD|ISETP|LEA|LOP|LOP3|LOP32I|MOV|MOV32I"
        r"|P2R|PLOP3|POPC|PRMT|PSETP|R2P|SEL|SGXT|SHF|SHL|SHR|VABSDIFF|VABSDIFF4|VIADD|VIADDMNMX|VIMNMX|VIMNMX3"
    ),
}
AMDGCN_CLASSES: dict[Kind, str] = {
    "tensor": r"v_(mfma|smfmac|swmmac|wmma)_\w+",
    "half": r"v_pk_\w+_b?f16",
    # Before gfx940 scratch memory is reached through buffer instructions: only the comment tells a spill.
    "local access": r"scratch_(load|store)_\w+|buffer_(load|store)_\w+ .*Folded (Spill|Reload)",
    "async copy": r"(buffer|global)_load_lds_\w+|(buffer|global)_load_\w+ [^;]*\blds",
    "global load": r"(buffer|global)_load_\w+",
    "shared store": r"ds_(write|store)\w*",
    # Arithmetic and moves of the scalar ALU, once per wave.
    "uniform": (
        r"s_(abs|add|and|ashr|bcnt|bfe|bfi|bfm|bit|brev|cls|clz|cmov|cmp|cselect|ctz|ff|flbit|lshl|lshr|max|min|mov|mul"
        r"|nand|nor|not|or|pack|quadmask|sext|sub|wqm|xnor|xor)\w*"
    ),
    # Vector instructions on integers or bits, moves of accumulation registers and lane reads included; no conversions.
    "integer": r"v_pack_b32_f16|v_(?!cvt|frexp)(\w*_)?[biu](8|16|24|32|64)(_e32|_e64|_sdwa|_dpp)*",
}

# Bytes per thread of a copy or load by a part of its opcode, else one register; 0 where a thread copies for all.
WIDTHS = {
    **{"UTMALDG": 0, "UBLKCP": 0, "U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32},
    **{"ubyte": 1, "sbyte": 1, "u8": 1, "i8": 1, "ushort": 2, "sshort": 2, "short": 2, "u16": 2, "i16": 2, "b16": 2},
    **{"dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "b64": 8, "b96": 12, "b128": 16},
}
REGISTER_BYTES = 4
START = -1  # The node of the control flow graph before every function; the others are instructions by index.

SASS_LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<text>(?P<base>[A-Z]\w*).*?)\s*;")
AMDGCN_LINE = re.compile(r"\s*(?P<opcode>(?:v|s|ds|buffer|global|flat|scratch|image|tensor)_\w+)(?P<operands>[^;:]*)")
LABEL_LINE = re.compile(r"([.$\w]+):")


class MachineCodeError(RuntimeError):
    """The machine code cannot be read."""


@dataclass(frozen=True)
class Instruction:
    """An instruction without its guard, its class, if it has one, and the bytes per thread of a copy or load."""

    text: str
    kind: Kind | None
    num_bytes: int


@dataclass(frozen=True)
class Loop:
    """A natural loop's body by address, without the loops nested inside it."""

    instructions: tuple[Instruction, ...]

    @property
    def issued(self) -> int:
        """All instructions per trip."""
        return len(self.instructions)

    @property
    def integer(self) -> int:
        """Integer and logic instructions and moves per thread and trip, integer multiply-adds included."""
        return len(self._of_kind("integer"))

    @property
    def uniform(self) -> int:
        """Instructions of the uniform datapath (AMD: the scalar ALU) per warp and trip."""
        return len(self._of_kind("uniform"))

    @property
    def half(self) -> int:
        """Packed 16-bit float instructions, float16 and bfloat16, per thread and trip."""
        return len(self._of_kind("half"))

    @property
    def tensor(self) -> int:
        """Instructions of the tensor cores (AMD: the matrix cores) per warp and trip, whatever the size of each."""
        return len(self._of_kind("tensor"))

    @property
    def shared_stores(self) -> int:
        """Stores from registers to shared memory per thread and trip."""
        return len(self._of_kind("shared store"))

    @property
    def asynchronous_copies(self) -> dict[int, int]:
        """Copies per trip from global to shared memory past the registers, by bytes per thread (0: bulk, tensor)."""
        return dict(Counter(copy.num_bytes for copy in self._of_kind("async copy")))

    @property
    def global_loads(self) -> dict[int, int]:
        """Instructions per trip that load global memory into registers, by their bytes per thread."""
        return dict(Counter(load.num_bytes for load in self._of_kind("global load")))

    def _of_kind(self, kind: Kind) -> list[Instruction]:
        return [instruction for instruction in self.instructions if instruction.kind == kind]


@dataclass(frozen=True)
class MachineCode:
    """What a compiled kernel needs and its loops in the order of their headers' addresses."""

    # 32-bit per thread. AMD: `.vgpr_count` of the metadata, which on gfx90a and later, where both kinds share a file,
    # is the VGPRs rounded up to the offset of the accumulation registers plus these.
    registers: int
    # Bytes per thread. NVIDIA: stack and local memory. AMD: 4 per spilled VGPR and SGPR plus the private segment, in
    # which most of them lie: more than is used, but 0 only if nothing is spilled or private.
    spill_bytes: int
    # Instructions of the whole kernel that load or store local (AMD: scratch) memory, not executions.
    local_accesses: int
    loops: tuple[Loop, ...]

    @property
    def main_loops(self) -> tuple[Loop, ...]:
        """The loops that use the tensor cores outside of loops nested inside them."""
        return tuple(loop for loop in self.loops if loop.tensor)


@dataclass(frozen=True)
class _Step:
    """An instruction and where control goes after it: to labels, and to the next one."""

    instruction: Instruction
    targets: list[str]
    falls_through: bool


def read_cubin(cubin: bytes) -> MachineCode:
    """The counts of an NVIDIA kernel, through the disassembler in Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return parse_sass(_run("nvdisasm", "-c", file.name), _run("cuobjdump", "-res-usage", file.name))


def parse_sass(listing: str, resources: str) -> MachineCode:
    """The counts in what `nvdisasm -c` and `cuobjdump -res-usage` print about a cubin."""
    registers, stack, local = (_largest(rf"\b{name}:(\d+)", resources) for name in ("REG", "STACK", "LOCAL"))
    return _count(listing, SASS_LINE, _sass_step, registers, stack + local)


def read_amdgcn(assembly: str) -> MachineCode:
    """The counts of an AMD kernel, from the compiler's assembly."""
    registers, vgprs, sgprs, private = (
        _largest(rf"\.{field}:\s*(\d+)", assembly)
        for field in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    )
    return _count(assembly, AMDGCN_LINE, _amdgcn_step, registers, (vgprs + sgprs) * REGISTER_BYTES + private)


def _run(tool: str, *arguments: str) -> str:
    try:
        from triton import knobs  # type: ignore[import-untyped, unused-ignore]

        program = getattr(knobs.nvidia, tool).path
    except (ImportError, RuntimeError) as error:
        raise MachineCodeError(f"{tool} is missing: it comes with Triton's wheel for Linux") from error
    completed = subprocess.run([program, *arguments], capture_output=True, text=True)
    if completed.returncode:
        raise MachineCodeError(f"{tool} failed: {' '.join((completed.stderr or completed.stdout).split())}")
    return completed.stdout


def _largest(pattern: str, text: str) -> int:
    """The largest number at a pattern: a kernel and the functions that it calls are listed each by itself."""
    if not (numbers := re.findall(pattern, text)):
        raise MachineCodeError("the machine code describes no kernel")
    return max(map(int, numbers))


def _count(
    listing: str, pattern: re.Pattern[str], read: Callable[[re.Match[str]], _Step], registers: int, spill_bytes: int
) -> MachineCode:
    steps: list[_Step] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := LABEL_LINE.match(line):
            labels[label[1]] = len(steps)
        elif match := pattern.match(line):
            steps.append(read(match))
    if not steps:
        raise MachineCodeError("the machine code has no instructions")
    local_accesses = sum(step.instruction.kind == "local access" for step in steps)
    return MachineCode(registers, spill_bytes, local_accesses, _find_loops(steps, _control_flow(steps, labels)))


def _sass_step(match: re.Match[str]) -> _Step:
    base, text = match["base"], match["text"]
    # BSSY and WARPSYNC name a label without jumping there; execution continues behind BSYNC.
    jumps = base in {"BRA", "BRX", "BRXU", "CALL", "JMP", "JMX", "JMXU"}
    # A computed jump has its targets in a comment. A call of a symbol returns; ptxas calls a label to leave a loop.
    targets = re.findall(r"\.L_\w+", text) if jumps else []
    leaves = base in {"EXIT", "RET"} or (jumps and (base != "CALL" or bool(targets)))
    # The condition is a guard or an operand before the label (BRA.U !UP0, BRA.DIV UR4).
    conditional = match["guard"] is not None or ", `(" in text
    return _Step(_instruction(text, SASS_CLASSES), targets, conditional or not leaves)


def _amdgcn_step(match: re.Match[str]) -> _Step:
    opcode = match["opcode"]
    targets = [match["operands"].strip()] if opcode.startswith(("s_branch", "s_cbranch")) else []
    instruction = _instruction(match.string.strip(), AMDGCN_CLASSES)
    return _Step(instruction, targets, falls_through=opcode not in {"s_branch", "s_endpgm", "s_setpc_b64"})


def _instruction(text: str, classes: dict[Kind, str]) -> Instruction:
    kind = next((kind for kind, pattern in classes.items() if re.match(rf"(?:{pattern})\b", text)), None)
    num_bytes = next((WIDTHS[part] for part in re.split(r"[._]", text.split()[0]) if part in WIDTHS), REGISTER_BYTES)
    return Instruction(text, kind, num_bytes if kind in ("async copy", "global load") else 0)


def _control_flow(steps: list[_Step], labels: dict[str, int]) -> "nx.DiGraph[int]":
    """What can be reached from the starts of functions; a node is an instruction, as blocks would only save nodes."""
    # Labels inside a function begin with a dot; sections without instructions have labels too.
    starts = {0, *(step for label, step in labels.items() if not label.startswith(".") and step < len(steps))}
    graph = nx.DiGraph((START, step) for step in starts)
    for step, code in enumerate(steps):
        graph.add_edges_from((step, labels[target]) for target in code.targets)
        if code.falls_through and step + 1 < len(steps):
            graph.add_edge(step, step + 1)
    return graph.subgraph({START, *nx.descendants(graph, START)})


def _find_loops(steps: list[_Step], graph: "nx.DiGraph[int]") -> tuple[Loop, ...]:
    """Every natural loop: a header that dominates the ends of its back edges, and what reaches them without it."""
    tree = nx.DiGraph((parent, child) for child, parent in nx.immediate_dominators(graph, START).items())
    # A header is entered from outside and from its body.
    entered = ((end, header) for end, header in graph.edges if graph.in_degree(header) > 1)
    back_edges = [(end, header) for end, header in entered if nx.has_path(tree, header, end)]
    bodies: defaultdict[int, set[int]] = defaultdict(set)
    for end, header in back_edges:
        bodies[header] |= {end} | nx.ancestors(nx.restricted_view(graph, [], graph.in_edges(header)), end)
    if not nx.is_directed_acyclic_graph(nx.restricted_view(graph, [], back_edges)):
        raise MachineCodeError("a loop is entered in several places, so that it has no body to count")
    loops = []
    for header, body in sorted(bodies.items()):
        nested = [other for inner, other in bodies.items() if inner != header and inner in body]
        loops.append(Loop(tuple(steps[step].instruction for step in sorted(body.difference(*nested)))))
    return tuple(loops)
