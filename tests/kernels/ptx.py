"""Runs inline PTX without a GPU: the few instructions that the decoders use, on vectors of 32-bit registers.

What it runs is the text that Triton compiles. Whatever it does not know it refuses, so that nothing is skipped.
"""

import operator
import re
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Register = NDArray[np.uint32]
Float = NDArray[np.float64]

INTEGER = frozenset({"and.b32", "or.b32", "shl.b32", "lop3.b32"})

# Stored mantissa bits and exponent bias of the two 16-bit formats.
_FORMATS = {"fma.rn.bf16x2": (7, 127), "fma.rn.f16x2": (10, 15)}


class PtxError(ValueError):
    """Text that this emulator does not know, or that reads what was never written."""


def instructions(body: str) -> tuple[set[str], list[tuple[str, list[str]]]]:
    """The registers that a body `{ .reg .b32 ...; instruction; ... }` declares, and its opcodes with their operands."""
    outer = re.fullmatch(r"\s*\{([^{}]*;)\s*\}\s*", body)
    if outer is None:
        raise PtxError(f"not one block of statements: {body}")
    registers: set[str] = set()
    found = []
    for statement in outer[1].split(";")[:-1]:
        opcode, _, rest = statement.strip().partition(" ")
        operands = [operand.strip() for operand in rest.split(",")]
        if opcode == ".reg":
            kind, _, operands[0] = operands[0].partition(" ")
            if kind != ".b32":
                raise PtxError(f"unknown declaration: {statement}")
            registers.update(operand.strip() for operand in operands)
        else:
            found.append((opcode, operands))
    return registers, found


def execute(body: str, results: int, *inputs: Register) -> list[Register]:
    """Runs a body whose operands are `$0`, `$1`, ...: first the results, then the inputs, all of one shape."""
    registers, program = instructions(body)
    readable = {f"${results + index}": value.astype(np.uint32, casting="safe") for index, value in enumerate(inputs)}
    writable = registers | {f"${index}" for index in range(results)}

    def read(operand: str) -> Register:
        if operand in readable:
            return readable[operand]
        if not re.fullmatch(r"0[xX][0-9a-fA-F]+|0|[1-9][0-9]*", operand) or int(operand, 0) >> 32:
            raise PtxError(f"neither a register that was written nor a 32-bit constant: {operand}")
        return np.full_like(inputs[0], int(operand, 0))

    for opcode, (target, *sources) in program:
        function, count = _OPERATIONS.get(opcode, (None, 0))
        if function is None or len(sources) != count:
            raise PtxError(f"unknown instruction: {opcode} with {len(sources)} sources")
        if target not in writable:
            raise PtxError(f"not a register to write: {target}")
        if opcode in _FORMATS and not readable.keys() >= set(sources):
            raise PtxError(f"{opcode} takes written registers only: {sources}")
        readable[target] = function(*map(read, sources))
    return [read(f"${index}") for index in range(results)]


@np.errstate(invalid="ignore")
def to_float(bits: NDArray[np.unsignedinteger], opcode: str) -> Float:
    """The numbers behind 16-bit patterns, in the format that `opcode` computes in."""
    if opcode == "fma.rn.f16x2":
        return bits.astype(np.uint16).view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def round_bits(values: Float, opcode: str) -> Register:
    """The patterns of `values` rounded once, to nearest even, to the format of `opcode`; NaN has one pattern."""
    mantissa, bias = _FORMATS[opcode]
    # 2**300 is far beyond either format; it stands in for infinity and, until the end, for NaN.
    size = np.fmin(np.abs(values), 2.0**300)
    # Subnormal numbers share the step of the smallest normal ones.
    exponent = np.frexp(np.maximum(size, 2.0 ** (1 - bias)))[1] - 1
    # Scaling by a power of two is exact here, and `rint` breaks ties to even. The leading bit adds one to the exponent.
    steps = np.rint(np.ldexp(size, mantissa - exponent)).astype(np.int32)
    magnitude = np.minimum(((exponent + bias - 1) << mantissa) + steps, (2 * bias + 1) << mantissa)
    signed = magnitude | np.signbit(values).astype(np.int32) << 15
    return np.where(np.isnan(values), 0x7FFF, signed).astype(np.uint32)


@np.errstate(invalid="ignore")
def _fma(opcode: str, a: Register, b: Register, c: Register) -> Register:
    halves = []
    for shift in (0, 16):
        x, y, z = (to_float(register >> np.uint32(shift) & np.uint32(0xFFFF), opcode) for register in (a, b, c))
        # float64 holds the product of two 16-bit numbers exactly, but not every sum. What the sum lost is known
        # (Knuth's two-sum); making an inexact sum odd, towards what it lost, lets the second rounding be right.
        product = x * y
        total = product + z
        back = total - product
        lost = (product - (total - back)) + (z - back)
        even = total.view(np.int64) & 1 == 0
        odd = np.nextafter(total, np.copysign(np.inf, lost))
        halves.append(round_bits(np.where(np.isfinite(total) & (lost != 0) & even, odd, total), opcode))
    return halves[0] | halves[1] << np.uint32(16)


def _lop3(a: Register, b: Register, c: Register, table: Register) -> Register:
    result = np.zeros_like(a)
    for row in range(8):
        x, y, z = (bits if row & place else ~bits for bits, place in ((a, 4), (b, 2), (c, 1)))
        result |= np.where(table >> np.uint32(row) & 1, x & y & z, np.uint32(0))
    return result


def _shl(a: Register, by: Register) -> Register:
    return np.where(by < 32, a << np.minimum(by, np.uint32(31)), np.uint32(0))


_OPERATIONS: dict[str, tuple[Callable[..., Register], int]] = {
    "mov.b32": (np.copy, 1),
    "and.b32": (operator.and_, 2),
    "or.b32": (operator.or_, 2),
    "shl.b32": (_shl, 2),
    "lop3.b32": (_lop3, 4),
    **{opcode: (lambda a, b, c, opcode=opcode: _fma(opcode, a, b, c), 3) for opcode in _FORMATS},
}
