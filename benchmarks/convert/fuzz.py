"""Sources with headers or an index damaged at random: each is refused in a sentence, or converts to what verifies."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.convert.source import MixtralSizes, write_source
from vllm_puzzle.format import INDEX_FILE
from vllm_puzzle.offline.conversion.convert import convert
from vllm_puzzle.offline.conversion.options import ConvertOptions
from vllm_puzzle.offline.errors import CheckpointError
from vllm_puzzle.offline.verify import verify

_SIZES = MixtralSizes(num_hidden_layers=2, hidden_size=64, intermediate_size=32, num_local_experts=4)
_SHARD_SIZE = 80_000


def fuzz(work: Path, count: int, seed: int) -> dict[str, object]:
    """Damages one file of a small source in `count` ways and converts each time.

    Returns:
        How many were `refused` by a CheckpointError, how many `converted` and verified; the damages that did neither
        and those after which something was left under the final name.
    """
    generator = random.Random(seed)
    source, packed = work / "source", work / "packed"
    write_source(source, _SIZES, _SHARD_SIZE)
    names = sorted(file.name for file in source.glob("*.safetensors"))
    originals = {name: (source / name).read_bytes() for name in [*names, INDEX_FILE]}
    refused = converted = 0
    untyped: list[str] = []
    left_behind: list[str] = []
    for _ in range(count):
        name = generator.choice([*names, INDEX_FILE])
        damage = generator.choice(_DAMAGES)
        (source / name).write_bytes(damage(originals[name], generator))
        what = f"{name}: {damage.__name__}"
        try:
            convert(source, packed, ConvertOptions(rule="paper"), lambda _: None, lambda _, __: None)
            verify(source, packed, lambda _, __: None)
            converted += 1
        except CheckpointError:
            refused += 1
            if packed.exists():
                left_behind.append(what)
        except Exception as error:
            untyped.append(f"{what}: {type(error).__name__}: {error}")
        shutil.rmtree(packed, ignore_errors=True)
        (source / name).write_bytes(originals[name])
    return {
        "files": count,
        "refused": refused,
        "converted": converted,
        "untyped": untyped,
        "left_behind": left_behind,
    }


def _header_end(content: bytes) -> int:
    """Where the part ends that says what the rest is; of an index that is all."""
    if content[:1] == b"{":
        return len(content)
    return 8 + int.from_bytes(content[:8], "little")


def _flip_a_bit(content: bytes, generator: random.Random) -> bytes:
    changed = bytearray(content)
    changed[generator.randrange(_header_end(content))] ^= 1 << generator.randrange(8)
    return bytes(changed)


def _change_a_digit(content: bytes, generator: random.Random) -> bytes:
    changed = bytearray(content)
    digits = [index for index in range(8, _header_end(content)) if chr(content[index]).isdigit()]
    changed[generator.choice(digits)] = ord(generator.choice("0123456789"))
    return bytes(changed)


def _truncate(content: bytes, generator: random.Random) -> bytes:
    return content[: generator.randrange(len(content))]


def _cut_out(content: bytes, generator: random.Random) -> bytes:
    start = generator.randrange(_header_end(content))
    return content[:start] + content[start + generator.randrange(1, 40) :]


def _insert(content: bytes, generator: random.Random) -> bytes:
    start = generator.randrange(_header_end(content))
    return content[:start] + generator.randbytes(generator.randrange(1, 40)) + content[start:]


def _edit_json(content: bytes, generator: random.Random) -> bytes:
    """A value exchanged, or a key gone, doubled or renamed, with everything around it in order."""
    end = _header_end(content)
    is_index = end == len(content)
    text = content[:end] if is_index else content[8:end]
    tree = json.loads(text)
    node = tree["weight_map"] if is_index else tree
    key = generator.choice(sorted(node))
    if generator.random() < 0.5 and isinstance(node[key], dict) and node[key]:
        node, key = node[key], generator.choice(sorted(node[key]))
    edit = generator.randrange(4)
    if edit == 0:
        node[key] = generator.choice(_VALUES)
    elif edit == 1:
        del node[key]
    elif edit == 2:
        node[key + "x"] = node.pop(key)
    else:
        node[key + "x"] = node[key]
    changed = json.dumps(tree).encode()
    return changed if is_index else len(changed).to_bytes(8, "little") + changed + content[end:]


_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**63, 2**64, 1.5),
    *("", "BF16", "F64", "../up.safetensors", "/etc/passwd"),
    *([], [0, 0], {}),
)


def _double_a_key(content: bytes, generator: random.Random) -> bytes:
    end = _header_end(content)
    is_index = end == len(content)
    text = (content[:end] if is_index else content[8:end]).strip()
    inside = json.loads(text)["weight_map"] if is_index else json.loads(text)
    key = generator.choice(sorted(inside))
    entry = f"{json.dumps(key)}: {json.dumps(inside[key])}".encode()
    place = text.index(b"{", text.index(b"weight_map")) + 1 if is_index else 1
    changed = text[:place] + entry + b"," + text[place:]
    return changed if is_index else len(changed).to_bytes(8, "little") + changed + content[end:]


_DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip_a_bit,
    _change_a_digit,
    _truncate,
    _cut_out,
    _insert,
    _edit_json,
    _double_a_key,
)
