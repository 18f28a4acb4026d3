"""A real server: the `vllm` command, another process, HTTP, the official client, and a shutdown that ends it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import copytree
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from openai import OpenAI

from benchmarks.demo.server import serving
from tests.plugin.checkpoints import edit_shard
from tests.plugin.engine import generate, running
from tests.tiny import build_tiny, remove_tensors

CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def chat_model(packed: Path) -> Path:
    (packed / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return packed


def test_chat_completion_and_stream_over_http(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    # For `collective_rpc` over HTTP.
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    lacking = copytree(chat_model, tmp_path / "lacking")
    remove_tensors(lacking, {"model.layers.1.self_attn.q_proj.weight"})
    strange = copytree(chat_model, tmp_path / "strange")
    edit_shard(strange, lambda tensors: tensors.update(strange=torch.zeros(1)), follow=True)
    prompt = "three pears and"
    options = ("--quantization", "puzzlemoe", "--dtype", "float32")
    with serving(chat_model, tmp_path / "server.log", *options) as server:
        client = OpenAI(base_url=server.base_url, api_key="none")
        assert [model.id for model in client.models.list()] == [str(chat_model)]
        chat = client.chat.completions.create(
            model=str(chat_model), messages=[{"role": "user", "content": "hi"}], temperature=0, max_tokens=8
        )
        assert chat.usage is not None
        assert chat.usage.completion_tokens > 0
        whole = client.completions.create(
            model=str(chat_model),
            prompt=prompt,
            temperature=0,
            max_tokens=16,
            logprobs=0,
            extra_body={"ignore_eos": True},
        )
        streamed = [
            chunk.choices[0].text
            for chunk in client.completions.create(
                model=str(chat_model),
                prompt=prompt,
                temperature=0,
                max_tokens=16,
                stream=True,
                extra_body={"ignore_eos": True},
            )
        ]
        assert post(server.base_url, "collective_rpc", {"method": "reload_weights"}) == 200
        for model in (lacking, strange):
            weights = {"method": "reload_weights", "kwargs": {"weights_path": str(model)}}
            with pytest.raises(HTTPError, match="500"):
                post(server.base_url, "collective_rpc", weights)
        reloaded = client.completions.create(
            model=str(chat_model), prompt=prompt, temperature=0, max_tokens=16, extra_body={"ignore_eos": True}
        )
        assert reloaded.choices[0].text == whole.choices[0].text
    # A character cut off by the last token shows as a replacement in one and not in the other.
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 16
    answer = whole.choices[0].text.rstrip("\ufffd")
    assert "".join(streamed).rstrip("\ufffd") == answer
    log = (tmp_path / "server.log").read_text()
    assert "Routed experts run from packed pairs on the engine cpu-portable" in log
    # The server is gone: nobody answers, and the same tokens come from an engine in this process.
    with pytest.raises(OSError, match="refused"):
        urlopen(server.base_url.removesuffix("/v1") + "/health", timeout=5)
    with running(chat_model, dtype="float32") as llm:
        (local,) = generate(llm, [llm.get_tokenizer().encode(prompt)], 16)
        assert llm.get_tokenizer().decode(local.tokens).rstrip("\ufffd") == answer


def post(base_url: str, path: str, body: dict[str, Any]) -> int:
    url = f"{base_url.removesuffix('/v1')}/{path}"
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as response:
        return int(response.status)


def serve_and_fail(model: Path, *options: str, **environment: str) -> str:
    """What `vllm serve` says before it gives up."""
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(model), "--host", "127.0.0.1", *options]
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300, check=False
    )
    assert result.returncode != 0
    return result.stdout + result.stderr


def test_a_model_that_is_not_packed_says_how_to_pack_it(tmp_path: Path) -> None:
    source = build_tiny("mixtral", tmp_path / "source")
    said = serve_and_fail(source, "--quantization", "puzzlemoe")
    assert "vllm-puzzle convert MODEL PACKED" in said


def test_another_quantization_names_both(packed: Path) -> None:
    said = serve_and_fail(packed, "--quantization", "fp8")
    assert "(puzzlemoe) does not match" in said


def test_without_the_plugin_the_model_card_has_the_answer(packed: Path) -> None:
    """vLLM's own words when the plugin is not there (here: left out by VLLM_PLUGINS) are those the card explains."""
    said = serve_and_fail(packed, VLLM_PLUGINS="none")
    assert "Unknown quantization method: puzzlemoe" in said
    card = (packed / "README.md").read_text()
    assert "Unknown quantization method: puzzlemoe" in card
    assert "pip install vllm-puzzle" in card
    assert json.loads((packed / "config.json").read_text())["quantization_config"]["quant_method"] == "puzzlemoe"
