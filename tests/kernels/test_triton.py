"""The Triton engine: every way of cutting the products, offsets beyond 32 bits, which device it takes."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton.language as tl

from tests.kernels.cases import INTERPRETED_TOLERANCE, TRITON_DEVICE, Case, check_what_is_not_finite
from tests.kernels.cuts import CUTS, Cut, check, make_config
from vllm_puzzle.format import pack
from vllm_puzzle.kernels import ENGINES, REFERENCE, TRITON, EngineError, choose_engine
from vllm_puzzle.kernels.triton.configs import FOLDER, CallSizes, find_config, load_configs
from vllm_puzzle.kernels.triton.moe import make_tiles, triton_moe
from vllm_puzzle.kernels.triton.target import INTERPRETED, Target, current_target

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@pytest.mark.heavy
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(
    ("num_tokens", "dtype"), [(1, torch.bfloat16), (2, torch.float16), (17, torch.bfloat16), (33, torch.float16)]
)
def test_numbers_of_tokens(cut: Cut, num_tokens: int, dtype: torch.dtype) -> None:
    """Sizes that are no multiple of any block, members without tokens, ids of -1."""
    case = Case(num_tokens, num_experts=6, pairs=2, top_k=2, hidden_size=40, intermediate_size=24, dtype=dtype)
    case.topk_ids[torch.rand(case.topk_ids.shape, generator=torch.Generator().manual_seed(1)) < 0.1] = -1
    check(case, cut)


@pytest.mark.heavy
@pytest.mark.parametrize("cut", [CUTS[0], CUTS[4]])
def test_three_hundred_tokens_and_none(cut: Cut) -> None:
    check(Case(num_tokens=300, num_experts=8, pairs=3, top_k=2, hidden_size=32, intermediate_size=16), cut)
    assert Case(num_tokens=0).run(engine=TRITON).shape == (0, 32)


@pytest.mark.heavy
@pytest.mark.parametrize("cut", CUTS[1:4])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("on_input", [False, True])
def test_activations_and_router_weights(cut: Cut, activation: str, on_input: bool) -> None:
    check(Case(num_tokens=9), cut, activation, on_input)


@pytest.mark.heavy
@pytest.mark.parametrize("cut", [CUTS[0], CUTS[2], CUTS[3]])
def test_adversarial_routing(cut: Cut) -> None:
    case = Case(num_tokens=20, num_experts=8, pairs=4, top_k=2)
    mates = torch.tensor([case.slots.members(slot) for slot in range(4)], dtype=torch.int32)
    for ids in (
        mates[0].expand(20, 2),  # One slot, both members, more than a block.
        mates[torch.arange(20) % 4],  # Every slot, always both members.
        mates[:, :1][torch.arange(20) % 4].expand(20, 2),  # First members only, each twice.
        torch.where(torch.arange(20)[:, None] % 5 > 0, -1, mates[3]),  # Most tokens are padding.
        torch.tensor([mates[0, 0]] * 19 + [mates[0, 1]])[:, None].expand(20, 2),  # Many of one member, one of its mate.
    ):
        case.topk_ids = ids.int().contiguous()
        check(case, cut)


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    """Memory that nobody has written holds NaN, and the largest integers."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.heavy
@pytest.mark.parametrize(("cut", "on_input"), [(CUTS[0], False), (CUTS[1], True), (CUTS[3], False)])
@pytest.mark.usefixtures("nan_in_new_memory")
def test_what_is_not_finite(cut: Cut, on_input: bool) -> None:
    """In rows and columns of tiles that reach beyond the matrices, in parts of sums, in tokens beside others."""
    assert torch.empty(2, device=TRITON_DEVICE).isnan().all()
    case = Case(num_tokens=13, num_experts=4, pairs=1, hidden_size=40, intermediate_size=24)
    config = make_config(*cut)
    check_what_is_not_finite(case, lambda: triton_moe(*case.tensors(TRITON), "silu", on_input, config).cpu())


def test_a_table_with_gaps_is_refused() -> None:
    """The kernels take it for contiguous, and would read other experts' slots."""
    case = Case()
    case.slot_of_expert = case.slot_of_expert.repeat_interleave(2)[::2]
    with pytest.raises(ValueError, match=r"slot_of_expert \(torch.int32, [\w:]+, not contiguous\)"):
        case.run(engine=TRITON)


@pytest.mark.heavy
def test_slots_beyond_32_bit_offsets() -> None:
    """Untouched memory costs nothing, so that a layer of 2**32 words can be had."""
    case = Case(num_tokens=3, num_experts=2, pairs=1, top_k=2, hidden_size=512, intermediate_size=512)
    expected = case.expected()
    num_slots = 2**32 // case.w13.numel() + 1
    for name in ("w13", "w2"):
        words = getattr(case, name)
        large = torch.empty(num_slots, *words.shape[1:], dtype=words.dtype)
        large[-1] = words[0]
        setattr(case, name, large)
    assert case.w2.numel() > 2**31
    case.slot_of_expert += 2 * (num_slots - 1)
    case.compare(case.run(engine=TRITON), expected, INTERPRETED_TOLERANCE[torch.bfloat16])


def test_a_result_repeats_bit_by_bit() -> None:
    case = Case(num_tokens=20, num_experts=6, pairs=3, top_k=2)
    assert torch.equal(case.run(engine=TRITON), case.run(engine=TRITON))


def test_what_kernels_are_compiled_for_can_be_written_as_json() -> None:
    """Where a hook watches compilations, as vLLM's does, Triton writes a kernel's constants as JSON."""
    target = Target(family="sm90", device_name="none", num_sms=132, ptx=True)
    tiles = [make_tiles(make_config(*cut), target, 64, 32, tl.bfloat16)[0] for cut in CUTS]
    written = json.dumps(tiles)
    assert "fma.rn.bf16x2" in written
    assert len({*tiles}) == len(json.loads(written)) == len(CUTS)
    assert tiles[0] == make_tiles(make_config(*CUTS[0]), target, 64, 32, tl.bfloat16)[0]


def test_magnitudes_that_float16_cannot_hold_are_found() -> None:
    masks, signs = [torch.tensor(True)] * 2, [torch.tensor(False)] * 2
    words = torch.stack([pack(torch.full((2, 2), value), masks, signs) for value in (1.0, 32640.0, 32768.0)])
    engine = ENGINES[TRITON]
    assert engine.check(words, torch.float16) == 2
    assert engine.check(words[:2], torch.float16) is None
    assert engine.check(words, torch.bfloat16) is None


def gpu(monkeypatch: pytest.MonkeyPatch, major: int, minor: int, hip: str | None = None) -> torch.device:
    """A device that torch pretends to see; every one has an index of its own, since targets are cached."""
    properties = SimpleNamespace(name="NVIDIA X/1 Y", multi_processor_count=99, major=major, minor=minor)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: properties)
    monkeypatch.setattr("torch.version.hip", hip)
    return torch.device("cuda", 10 * major + minor - (hip is not None))


def test_each_gpu_gets_its_family(monkeypatch: pytest.MonkeyPatch) -> None:
    for major, minor, family in ((8, 0, "sm80"), (8, 9, "sm89"), (9, 0, "sm90"), (10, 3, "sm100"), (12, 0, "sm89")):
        target = current_target(gpu(monkeypatch, major, minor))
        assert target == Target(family=family, device_name="NVIDIA X/1 Y", num_sms=99, ptx=True)
    assert current_target(gpu(monkeypatch, 9, 4, hip="6.4")) == Target("gfx942", "NVIDIA X/1 Y", 99, ptx=False)


def test_the_engine_is_chosen_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PUZZLE_ENGINE", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(EngineError, match=r"needs a CUDA or ROCm device and torch .* sees none"):
        choose_engine(torch.device("cuda", 70), torch.bfloat16)
    hopper = gpu(monkeypatch, 9, 0)
    assert choose_engine(hopper, torch.bfloat16).name == TRITON
    assert choose_engine(hopper, torch.float16).name == TRITON
    with pytest.raises(EngineError, match="bfloat16 and float16 and the model runs in float32; serve with --dtype"):
        choose_engine(hopper, torch.float32)
    with pytest.raises(EngineError, match=r"compute capability 8.0\), NVIDIA X/1 Y has 7.5"):
        choose_engine(gpu(monkeypatch, 7, 5), torch.float16)
    monkeypatch.setenv("VLLM_PUZZLE_ENGINE", "triton")
    with pytest.raises(EngineError, match="computes on CUDA and ROCm devices, not on xpu"):
        choose_engine(torch.device("xpu"), torch.bfloat16)
    monkeypatch.setenv("VLLM_PUZZLE_ENGINE", "reference")
    assert choose_engine(hopper, torch.float32).name == REFERENCE


def test_sums_are_split_while_programs_are_few() -> None:
    hopper = Target(family="sm90", device_name="none tuned", num_sms=132, ptx=True)
    one, many = (find_config(hopper, CallSizes(128, 64, 2048, 768, 8, num_tokens)) for num_tokens in (1, 512))
    assert one.gate_up.split_k > 1
    assert (2048 // one.gate_up.block_k) % one.gate_up.split_k == 0
    assert many.gate_up.split_k == many.down.split_k == 1
    assert one.block_tokens < many.block_tokens
    assert find_config(hopper, CallSizes(8, 4, 4096, 14336, 2, num_tokens=4096)).down.split_k == 1


def test_tuned_configurations_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = load_configs(FOLDER / "sm90.json")
    chosen = {1: tuned[min(tuned)], 64: tuned[max(tuned)]}
    text = ", ".join(f'"{key}": {config.model_dump_json()}' for key, config in chosen.items())
    (tmp_path / "E-8_N-96_device_name-AMD_X-1_80GB_dtype-puzzlemoe.json").write_text(f"{{{text}}}", encoding="utf-8")
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    target = Target(family="sm90", device_name="AMD X-1 (80GB) ", num_sms=132, ptx=True)
    for num_tokens, key in ((1, 1), (30, 1), (40, 64), (5000, 64)):
        assert find_config(target, CallSizes(8, 4, 64, 96, 2, num_tokens)) == chosen[key]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a file of tile configurations: the file: Invalid JSON"),
        ("{}", "holds no tile configuration; remove it or tune again$"),
        ('{"1": {"members": 3}}', r"is not a file of tile configurations: 1\.members: .*; remove it or tune again$"),
    ],
)
def test_broken_configurations_are_refused_with_their_path(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(EngineError, match=f"{path} {message}"):
        load_configs(path)
