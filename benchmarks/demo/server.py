"""A vLLM server for as long as a block runs."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

START_TIMEOUT_S = 400
KV_CACHE_GIB = 1

_LOADED = re.compile(r"Loading weights took ([0-9.]+) seconds")


@dataclass(frozen=True)
class Server:
    """A running `vllm serve`."""

    base_url: str
    pid: int
    log: Path

    def resident_bytes(self) -> int:
        """What its processes keep in memory, pages that they share counted once (PSS)."""
        root = psutil.Process(self.pid)
        return sum(process.memory_full_info().pss for process in [root, *root.children(recursive=True)])

    def load_seconds(self) -> float:
        """How long vLLM says that loading the weights took.

        Raises:
            RuntimeError: it says nothing of it.
        """
        said = _LOADED.search(self.log.read_text())
        if said is None:
            raise RuntimeError(f"vllm serve does not say how long it loaded weights; see {self.log}")
        return float(said[1])


@contextmanager
def serving(model: Path, log: Path, *options: str) -> Iterator[Server]:
    """`vllm serve` on loopback with more `options`, stopped at the block's end.

    Raises:
        RuntimeError: the server ended or did not answer in time; its log has the reason.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(model)]
    # Compiling takes longer than it saves in a demonstration of two answers.
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", *options]
    print("$", " ".join([*command[:3], *options]), flush=True)
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("w") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        _wait_until_healthy(f"http://127.0.0.1:{port}/health", server, log)
        yield Server(f"http://127.0.0.1:{port}/v1", server.pid, log)
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _wait_until_healthy(url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"vllm serve ended with status {server.returncode}; see {log}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise RuntimeError(f"vllm serve did not answer within {START_TIMEOUT_S} s; see {log}")
