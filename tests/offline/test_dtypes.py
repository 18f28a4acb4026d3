"""Tensors beside the experts of every dtype, size and rank that safetensors has: copied bit for bit, or refused."""

import json
import math
from pathlib import Path

import pytest

from tests.offline.faulty import assert_refused
from vllm_puzzle.cli import main
from vllm_puzzle.offline.checkpoints.source import SourceCheckpoint

# As the format's own documentation lists them.
BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
}
SHAPES: list[tuple[int, ...]] = [(), (0,), (3, 0), (6,), (3, 2, 4)]


def read_raw(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Dtype, shape and bytes of every tensor of a folder, by no library."""
    tensors = {}
    for file in path.glob("*.safetensors"):
        content = file.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            tensors[name] = (entry["dtype"], entry["shape"], content[start + begin : start + end])
    return tensors


def add_raw(source: Path, added: dict[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    file = source / "model.safetensors"
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8:start]), content[start:]
    for name, (dtype, shape, values) in added.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_every_dtype_is_copied_bit_for_bit(source: Path, tmp_path: Path) -> None:
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    added = {}
    for dtype, bits in BITS.items():
        for shape in SHAPES:
            if dtype != "F4" or (shape and shape[-1] % 2 == 0):
                values = bytes(n % 2 for n in range(math.prod(shape) * bits // 8))
                added[f"model.more.{dtype}.{len(shape)}.{math.prod(shape)}"] = (dtype, shape, values)
    add_raw(source, added)
    sizes = SourceCheckpoint(source).tensors
    assert all(sizes[name].num_bytes == len(values) for name, (_, _, values) in added.items())
    assert main(["convert", str(source), str(packed), "--rule", "paper"]) == 0
    assert main(["verify", str(source), str(packed)]) == 0
    assert main(["unpack", str(packed), str(plain)]) == 0
    for path in (packed, plain):
        written = read_raw(path)
        for name, (dtype, shape, values) in added.items():
            assert written[name] == (dtype, list(shape), values)


@pytest.mark.parametrize(
    ("dtype", "shape"), [("F6_E2M3", (4, 8)), ("F6_E3M2", (8,)), ("F4", (4, 3))], ids=lambda value: str(value)
)
def test_what_torch_lacks_is_refused_before_the_work(
    dtype: str, shape: tuple[int, ...], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bits = {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}[dtype]
    add_raw(source, {"model.more": (dtype, shape, bytes(math.prod(shape) * bits // 8))})
    for arguments in (["convert", str(source), str(tmp_path / "packed")], ["plan", str(source)]):
        assert_refused(
            arguments, tmp_path, capsys, str(source / "model.safetensors"), f"model.more is {dtype} {list(shape)}"
        )
