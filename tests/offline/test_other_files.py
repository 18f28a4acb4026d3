"""Which files travel with a checkpoint: those that its config or tokenizer needs, and no weights in other formats."""

import json
import os
from pathlib import Path

from tests.offline.faulty import edit_config
from vllm_puzzle.cli import main

TRAVEL = [
    "additional_chat_templates/tool_use.jinja",
    "chat_template.json",
    "configuration_own.py",
    "generation_config.json",
    "LICENSE",
    "layers/attention.py",
    "layers/deep/__init__.py",
    "preprocessor_config.json",
    "spiece.model",
    "states.json",
    "tokenization_own.py",
    "vocab/words.dat",
    "vocab.bpe",
]
STAY = [
    ".cache/huggingface/x.json",
    "README.md",
    "consolidated.00.pth",
    "figures/plot.png",
    "hf_quant_config.json",
    "model.gguf",
    "onnx/config.json",
    "onnx/model.onnx",
    "original/params.json",
    "original/rank0/consolidated.00.pth",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "training_args.bin",
]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_what_travels_and_what_stays(source: Path, tmp_path: Path) -> None:
    before = files(source) - {"config.json", "model.safetensors"}
    for name in TRAVEL + STAY:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("{}" if name.endswith(".json") else f"# {name}")
    edit_config(source, auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    names = {"vocab_file": "vocab/words.dat", "other_file": "../precious.dat", "weights": "pytorch_model.bin"}
    (source / "tokenizer_config.json").write_text(json.dumps({**tokenizer, **names}))
    (tmp_path / "precious.dat").write_text("not of this model")
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    umask = os.umask(0o022)
    try:
        assert main(["convert", str(source), str(packed), "--rule", "paper"]) == 0
        assert main(["unpack", str(packed), str(plain)]) == 0
    finally:
        os.umask(umask)
    travelled = before | set(TRAVEL)
    weights = {"config.json", "model.safetensors.index.json"}
    for folder, own in ((packed, {"README.md", "puzzlemoe_manifest.json"}), (plain, set())):
        assert {name for name in files(folder) if not name.endswith(".safetensors")} == travelled | weights | own
        for name in travelled:
            assert (folder / name).read_bytes() == (source / name).read_bytes()
        for path in folder.rglob("*"):
            assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644)
