"""vLLM's Triton fused_moe without vLLM, in a zip to carry to a card that has torch and Triton alone.

    python -m benchmarks.gpu_session.peer VLLM DEST --library CUDA_WHEEL

VLLM is a vLLM wheel, or the `vllm` folder of an installed one: its fused_moe.py, moe_align_block_size.py and tuned
tiles are taken as they are. CUDA_WHEEL is a wheel of vLLM built for the torch of the card, of which the compiled
moe_align_block_size and moe_sum are taken; without it torch's kernels stand in for them, a dozen small ones, so that
times of few tokens say little. All else that fused_moe.py imports is written in `stubs`.
"""

import argparse
import re
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.gpu_session.workload import REAL

FOLDER = "vllm/model_executor/layers/fused_moe"
TAKEN = (f"{FOLDER}/fused_moe.py", f"{FOLDER}/moe_align_block_size.py")
LIBRARY = "vllm/_moe_C_stable_libtorch.abi3.so"
STUBS = Path(__file__).with_name("stubs")
# H100 has none for some shapes, and is the same processor.
DEVICES = ("NVIDIA_H100_80GB_HBM3", "NVIDIA_H200")


class PeerError(Exception):
    """Something that should be gathered is not there."""


def read(source: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The files of a wheel or of a folder `vllm` by their names in a wheel.

    Raises:
        PeerError: it is neither.
    """
    if source.is_dir():
        names = {path.relative_to(source.parent).as_posix(): path for path in source.rglob("*") if path.is_file()}
        return {name: path.read_bytes() for name, path in names.items() if wanted(name)}
    try:
        with zipfile.ZipFile(source) as archive:
            return {name: archive.read(name) for name in archive.namelist() if wanted(name)}
    except (OSError, zipfile.BadZipFile) as error:
        raise PeerError(f"{source} cannot be read as a wheel or a folder: {error}") from None


def gather(vllm: Path, library: Path | None) -> Mapping[str, bytes]:
    """The peer's files by name.

    Raises:
        PeerError: something that is taken is not there.
    """
    files = read(vllm, lambda name: name in TAKEN or _is_tuned(name))
    if missing := [name for name in TAKEN if name not in files]:
        raise PeerError(
            f"{vllm} has no {missing[0]}; give a wheel of vLLM 0.32, or the folder vllm of an installed one"
        )
    if library is not None:
        found = read(library, lambda name: name == LIBRARY)
        if not found:
            raise PeerError(f"{library} has no {LIBRARY}; give a CUDA wheel of vLLM for the card's torch, as 0.24")
        files |= found
    stubs = {path.relative_to(STUBS).as_posix(): path.read_bytes() for path in STUBS.rglob("*.py")}
    return files | stubs


def _is_tuned(name: str) -> bool:
    match = re.fullmatch(rf"{FOLDER}/configs/E=(\d+),N=(\d+),device_name=([^,.]+).*\.json", name)
    sizes = {(shape.num_experts, shape.intermediate_size) for shape in REAL.shapes}
    return match is not None and (int(match[1]), int(match[2])) in sizes and match[3] in DEVICES


def write(files: Mapping[str, bytes], destination: Path) -> None:
    """A zip; what travels is counted as it is, so it is compressed as far as can be."""
    with zipfile.ZipFile(destination, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in sorted(files.items()):
            archive.writestr(name, content)


def main() -> int:
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_session.peer", description=description)
    parser.add_argument("vllm", type=Path, metavar="VLLM", help="a vLLM wheel, or the folder vllm of an installed one")
    parser.add_argument("destination", type=Path, metavar="DEST", help="the zip to write")
    parser.add_argument("--library", type=Path, metavar="CUDA_WHEEL", help="a vLLM wheel for the card's torch")
    arguments = parser.parse_args()
    try:
        files = gather(arguments.vllm, arguments.library)
        write(files, arguments.destination)
    except (OSError, PeerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    size = arguments.destination.stat().st_size
    print(f"{arguments.destination}: {len(files)} files, {size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
