"""Layers merged by the tasks of a Ray cluster on this machine."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from tests.offline.faulty import edit_tensors, snapshot
from vllm_puzzle.cli import main
from vllm_puzzle.offline.conversion.ray import RayPool

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield cluster.address
    cluster.shutdown()


def test_a_cluster_gives_the_same_bytes(address: str, source: Path, text: Path, tmp_path: Path) -> None:
    options = ["--rule", "saliency", "--calibration", str(text), "--calibration-sequences", "1"]
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    assert main(["convert", str(source), str(tmp_path / "here" / "packed"), *options]) == 0
    arguments = ["convert", str(source), str(tmp_path / "there" / "packed"), *options, "--ray", address, "--jobs", "2"]
    assert main(arguments) == 0
    assert snapshot(tmp_path / "here") == snapshot(tmp_path / "there")


def test_what_a_task_finds_is_said_in_one_sentence(
    address: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.2.block_sparse_moe.experts.5.w3.weight"
    edit_tensors(source, lambda tensors: tensors[name][3].__setitem__(7, 1e30))
    before = snapshot(tmp_path)
    assert main(["convert", str(source), str(tmp_path / "packed"), "--rule", "paper", "--ray", address]) == 1
    assert f"error: {name}[3, 7] is" in capsys.readouterr().err
    assert snapshot(tmp_path) == before


def test_a_task_that_is_lost_begins_again(address: str, tmp_path: Path) -> None:
    def die_once(marker: Path) -> str:
        if not marker.exists():
            marker.touch()
            os._exit(1)
        return "done"

    with RayPool(address, 1) as pool:
        assert pool.submit(die_once, tmp_path / "marker").result() == "done"


def test_without_a_cluster(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["convert", str(source), str(tmp_path / "packed"), "--rule", "paper", "--ray", "not an address"]
    assert main(arguments) == 1
    assert "error: --ray not an address: no cluster can be reached there" in capsys.readouterr().err
    assert not (tmp_path / "packed").exists()
