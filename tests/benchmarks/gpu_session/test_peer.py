"""vLLM's fused_moe, gathered for a card where there is no vLLM."""

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_session.peer import PeerError, gather
from benchmarks.gpu_session.peer import main as gather_peer
from benchmarks.gpu_session.workload import compile_peer
from vllm_puzzle.tuning.compiling import CompilePool
from vllm_puzzle.tuning.gpu import HOPPER
from vllm_puzzle.tuning.shape import LayerShape


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    """vLLM's fused_moe, gathered from the vLLM that is installed here."""
    vllm = next(folder for path in sys.path if (folder := Path(path) / "vllm").is_dir())
    zipped, folder = tmp_path / "peer.zip", tmp_path / "peer"
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_session.peer", str(vllm), str(zipped)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    with zipfile.ZipFile(zipped) as archive:
        archive.extractall(folder)
    return folder


def test_the_gathered_peer_imports_and_compiles(peer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PEER_DEVICE_NAME", "NVIDIA_H200")
    shape = LayerShape("", num_experts=8, hidden_size=256, intermediate_size=128, top_k=2)
    with CompilePool(HOPPER, workers=1, paths=[str(peer)]) as pool:
        done = list(pool.run(compile_peer, [(shape, 4, False), (shape, 4, True)]))
    assert [result.failure for result in done] == [None, None]
    names = {path.stem for path in (tmp_path / "cache").rglob("*.cubin")}
    assert {"fused_moe_kernel", "_silu_and_mul", "_quantize"} <= names


def test_the_compiled_library_comes_from_a_wheel(tmp_path: Path) -> None:
    fused = tmp_path / "vllm" / "model_executor" / "layers" / "fused_moe"
    fused.mkdir(parents=True)
    for name in ("fused_moe.py", "moe_align_block_size.py", "layer.py"):
        (fused / name).touch()
    wheel = tmp_path / "vllm.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm/_moe_C_stable_libtorch.abi3.so", b"compiled")
        archive.writestr("vllm/_C.abi3.so", b"more")
    files = gather(tmp_path / "vllm", wheel)
    assert files["vllm/_moe_C_stable_libtorch.abi3.so"] == b"compiled"
    assert "vllm/logger.py" in files
    assert not {"vllm/_C.abi3.so", "vllm/model_executor/layers/fused_moe/layer.py"} & set(files)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm/_C.abi3.so", b"more")
    with pytest.raises(PeerError, match=r"has no vllm/_moe_C_stable_libtorch.abi3.so; give a CUDA wheel"):
        gather(tmp_path / "vllm", wheel)


@pytest.mark.parametrize(("make", "sentence"), [
    (lambda path: path.mkdir(), "has no vllm/model_executor/layers/fused_moe/fused_moe.py"),
    (lambda path: path.write_text("no zip"), "cannot be read as a wheel or a folder"),
    (lambda path: None, "cannot be read as a wheel or a folder"),
])  # fmt: skip
def test_what_is_no_vllm_is_refused(
    make: Any, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    make(source)
    monkeypatch.setattr(sys, "argv", ["peer", str(source), str(tmp_path / "peer.zip")])
    assert gather_peer() == 1
    output, error = capsys.readouterr()
    assert (output, error.count("\n"), sentence in error) == ("", 1, True)
    assert not (tmp_path / "peer.zip").exists()
