"""What `verify` finds in coded experts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.offline.coded import convert
from tests.offline.faulty import assert_refused
from tests.tiny import INTERMEDIATE_SIZE, build_tiny, short_text
from vllm_puzzle.cli import main
from vllm_puzzle.format import pack_codes, unpack_codes, zero_code

pytestmark = pytest.mark.heavy

Change = Callable[[dict[str, torch.Tensor]], None]

EXPERT = "model.layers.1.block_sparse_moe.experts.5"
BITS = 5
SHARD = "model-00003-of-00004.safetensors"


def recode(name: str, columns: int, change: Callable[[torch.Tensor], object]) -> Change:
    """Changes the codes of a tensor, those of the padding included."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        codes = unpack_codes(tensors[name], BITS, columns)
        change(codes)
        tensors[name] = pack_codes(codes, BITS, zero_code(tensors[name.replace("_packed", "_codebook")]))

    return edit


def set_element(name: str, index: tuple[int, ...], value: float) -> Change:
    return lambda tensors: tensors[name].__setitem__(index, value)


def exchange(tensors: dict[str, torch.Tensor]) -> None:
    """Two experts, each whole."""
    for name in [name for name in tensors if name.startswith(f"{EXPERT}.")]:
        other = name.replace("experts.5.", "experts.2.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


CHANGES: dict[str, tuple[Change, tuple[str, ...]]] = {
    "a code": (
        recode(f"{EXPERT}.w1.weight_packed", 96, lambda codes: codes[7, 3:4].bitwise_xor_(1)),
        (f"{EXPERT}.w1.weight_packed has code", "in row 7, column 3", "is nearer to the source's"),
    ),
    "a code of down": (
        recode(f"{EXPERT}.w2.weight_packed", INTERMEDIATE_SIZE, lambda codes: codes[40, 39:40].bitwise_xor_(1)),
        (f"{EXPERT}.w2.weight_packed has code", "in row 40, column 39"),
    ),
    "padding": (
        recode(f"{EXPERT}.w2.weight_packed", 64, lambda codes: codes[9, 63:64].bitwise_xor_(1)),
        (f"{EXPERT}.w2.weight_packed has code", "in the padding of row 9"),
    ),
    "no zero": (
        lambda tensors: tensors[f"{EXPERT}.w1.weight_codebook"].add_(0.25),
        (f"{EXPERT}.w1.weight_codebook has no point (0, 0)",),
    ),
    "a point": (set_element(f"{EXPERT}.w2.weight_codebook", (3, 1), torch.nan), (f"{EXPERT}.w2", "not finite")),
    "a scale": (set_element(f"{EXPERT}.w3.weight_scale", (4,), torch.inf), (f"{EXPERT}.w1", "not finite")),
    "a negative scale": (
        set_element(f"{EXPERT}.w3.weight_scale", (4,), -0.5),
        (f"{EXPERT}.w3.weight_scale[4] is -0.5",),
    ),
    "a dense tensor": (
        lambda tensors: tensors["model.layers.1.self_attn.q_proj.weight"][2].add_(1),
        ("model.layers.1.self_attn.q_proj.weight differs",),
    ),
    "a missing tensor": (
        lambda tensors: tensors.pop(f"{EXPERT}.w3.weight_scale"),
        (f"{EXPERT}.w3.weight_scale", "not in"),
    ),
    "a shape": (
        lambda tensors: tensors.update({f"{EXPERT}.w2.weight_scale": torch.ones(95, dtype=torch.bfloat16)}),
        (f"{EXPERT}.w2.weight_scale is BF16 [95], the schema implies BF16 [96]",),
    ),
    "experts": (exchange, ("is nearer to the source's",)),
}


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source and its codes without calibration."""
    root = tmp_path_factory.mktemp("blind")
    source = build_tiny("mixtral", root / "source")
    return source, convert(source, root / "packed", "--bits", str(BITS / 2))


@pytest.mark.parametrize("change", CHANGES)
def test_verify_finds_what_was_changed(
    change: str, blind: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, packed = blind
    whole = (packed / SHARD).read_bytes()
    tensors = load_file(packed / SHARD)
    edit, parts = CHANGES[change]
    edit(tensors)
    save_file(tensors, packed / SHARD, {"format": "pt"})
    try:
        assert_refused(["verify", str(source), str(packed)], packed.parent, capsys, *parts)
    finally:
        (packed / SHARD).write_bytes(whole)


@pytest.mark.parametrize("change", ["no zero", "a point", "a scale"])
def test_what_cannot_be_decoded_is_not_unpacked_either(
    change: str, blind: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, packed = blind
    tensors = load_file(packed / SHARD)
    whole = (packed / SHARD).read_bytes()
    edit, parts = CHANGES[change]
    edit(tensors)
    save_file(tensors, packed / SHARD, {"format": "pt"})
    try:
        assert_refused(["unpack", str(packed), str(tmp_path / "plain")], tmp_path, capsys, *parts)
    finally:
        (packed / SHARD).write_bytes(whole)


def test_with_calibration_an_expert_is_known_by_what_it_computes(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here a code makes up for the errors of others."""
    options = ["--bits", "2", "--even", "--calibration", str(text), "--calibration-sequences", "1"]
    packed = convert(source, tmp_path / "packed", *options)
    original = load_file(packed / SHARD)

    def reorder_neurons_of_one_matrix(tensors: dict[str, torch.Tensor]) -> None:
        name = f"{EXPERT}.w2.weight_packed"
        tensors[name] = tensors[name].roll(1, 0)

    for change in (exchange, reorder_neurons_of_one_matrix):
        tensors = dict(original)
        change(tensors)
        save_file(tensors, packed / SHARD, {"format": "pt"})
        assert_refused(["verify", str(source), str(packed)], tmp_path, capsys, "in codes of 4 bits", "cosine")


@pytest.mark.heavy
def test_verify_accepts_experts_that_no_token_reached_and_channels_that_differ(tmp_path: Path) -> None:
    """Most channels differ by little, a few by much, as in language models: random inputs then say least."""
    (tmp_path / "text").write_text(short_text(80))
    source = build_tiny("olmoe", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    for layer in range(3):
        # Of two opposite answers of the router one is above zero, so what answers zero is never among the first.
        router = tensors[f"model.layers.{layer}.mlp.gate.weight"]
        router[[1, 6]] = -router[[0, 5]]
        router[[2, 3, 4, 7]] = 0
        norm = tensors[f"model.layers.{layer}.post_attention_layernorm.weight"]
        norm.copy_(torch.linspace(-1.5, 1.5, len(norm)).exp())
        norm[[3, 50]] *= 20
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    packed = convert(source, tmp_path / "packed", "--bits", "2", "--calibration", str(tmp_path / "text"))
    assert main(["verify", str(source), str(packed)]) == 0


@pytest.mark.parametrize("calibrated", [False, True])
def test_an_expert_without_any_weight_is_coded_exactly(
    calibrated: bool, source: Path, text: Path, tmp_path: Path
) -> None:
    tensors = load_file(source / "model.safetensors")
    for matrix in ("w1", "w2", "w3"):
        tensors[f"{EXPERT}.{matrix}.weight"].zero_()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    options = ["--calibration", str(text), "--calibration-sequences", "1"] if calibrated else []
    packed = convert(source, tmp_path / "packed", "--bits", "2", "--even", *options)
    assert main(["verify", str(source), str(packed)]) == 0


def test_a_rule_of_a_later_release(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = convert(source, tmp_path / "packed", "--bits", "2")
    config = packed / "config.json"
    config.write_text(config.read_text().replace('"rule": "codebook"', '"rule": "later"'))
    assert_refused(["verify", str(source), str(packed)], tmp_path, capsys, "coded by rule later", "the release")


def test_a_layer_that_no_list_names(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = convert(source, tmp_path / "packed", "--bits", "2")
    config = packed / "config.json"
    config.write_text(config.read_text().replace('"layer": 2', '"layer": 3'))
    assert_refused(["unpack", str(packed), str(tmp_path / "plain")], tmp_path, capsys, "layer", "again")
