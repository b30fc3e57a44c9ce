"""Endpoints of `vllm serve`, and `vllm bench`, beside BF16: what a client reads is equal, to the last digit."""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import features
import lora_adapters
import pytest
import tiny_models
from servers import server, wait_until_ready
from tiny_models import SHIPPED

pytestmark = [pytest.mark.engine, pytest.mark.alone, pytest.mark.on_demand]

VARYING = (
    "id",
    "created",
    "request_id",
    "root",
    "permission",
    "system_fingerprint",  # a hash of the server's options, --quantization among them
)  # of an answer, or of the server's place
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"
TEXTS = ["def read(", "return the sum", "import os"]
OURS = ("--quantization", "dfloat11")


def post(url: str, path: str, **body: Any) -> Any:
    """Return the answer to a request without what varies; an error is an answer too."""
    request = urllib.request.Request(
        f"{url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            text = response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    try:
        return without_varying(json.loads(text))
    except json.JSONDecodeError:
        return text


def without_varying(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: without_varying(value) for key, value in found.items() if key not in VARYING}
    return [without_varying(one) for one in found] if isinstance(found, list) else found


def generating(url: str, folder: Path) -> dict[str, Any]:
    """Ask what a model that generates is asked, and load an adapter into the running server."""
    how: dict[str, Any] = dict(model="m", temperature=0, max_tokens=8)
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": features.SCHEMA}}
    messages = [{"role": "user", "content": TEXTS[0]}]
    adapter = dict(lora_name="adapter", lora_path=str(folder / "adapter"))
    return {
        "tokenize": (tokens := post(url, "/tokenize", model="m", prompt=TEXTS[0])),
        "detokenize": post(url, "/detokenize", model="m", tokens=tokens["tokens"]),
        "completions": post(
            url, "/v1/completions", **how | dict(prompt=TEXTS[0], logprobs=20, echo=True)
        ),
        "n, seed": post(
            url, "/v1/completions", **how | dict(prompt=TEXTS[1], n=3, seed=4, temperature=0.9)
        ),
        "beam search": post(
            url, "/v1/completions", **how | dict(prompt=TEXTS[2], n=2, use_beam_search=True)
        ),
        "chat": post(
            url, "/v1/chat/completions", **how, messages=messages, logprobs=True, top_logprobs=20
        ),
        "structured output": post(
            url, "/v1/chat/completions", **how | dict(max_tokens=24), messages=messages, response_format=schema
        ),
        "load_lora_adapter": post(url, "/v1/load_lora_adapter", **adapter),
        "with the adapter": post(
            url, "/v1/completions", **how | dict(model="adapter", prompt=TEXTS[0], logprobs=20, echo=True)
        ),
        "unload_lora_adapter": post(url, "/v1/unload_lora_adapter", lora_name="adapter"),
        "adapter gone": post(url, "/v1/completions", **how | dict(model="adapter", prompt=TEXTS[0]))[0],
    }  # fmt: skip


def pooling(url: str, folder: Path) -> dict[str, Any]:
    """Ask what models are asked that embed, score or classify."""
    return {
        "embeddings": post(url, "/v1/embeddings", model="m", input=TEXTS),
        "score": post(url, "/score", model="m", text_1=TEXTS[0], text_2=TEXTS[1:]),
        "rerank": post(url, "/rerank", model="m", query=TEXTS[0], documents=TEXTS[1:]),
        "classify": post(url, "/classify", model="m", input=TEXTS),
        "pooling": post(url, "/pooling", model="m", input=TEXTS[0]),
        "tokenize": post(url, "/tokenize", model="m", prompt=TEXTS[0]),
    }


Asked = Callable[[str, Path], dict[str, Any]]
RERANKER = dict(architectures=["Qwen3ForSequenceClassification"], classifier_from_token=["a", "b"])
# name: (requests, options, which of them answer with something else than an error)
CASES: dict[str, tuple[Asked, tuple[str, ...], set[str]]] = {
    "generation": (
        generating,
        ("--enable-lora", "--max-lora-rank", "8", "--chat-template", TEMPLATE),
        {"completions", "n, seed", "beam search", "chat", "structured output", "with the adapter"},
    ),
    "embedding": (pooling, ("--runner", "pooling"), {"embeddings", "score", "rerank"}),
    "reranker": (
        pooling,
        ("--runner", "pooling", "--hf-overrides", json.dumps(RERANKER | {"method": "from_2_way_softmax"})),
        {"score", "rerank"},
    ),
}  # fmt: skip


def model_of(name: str, folder: Path) -> Path:
    if name == "generation":
        lora_adapters.save(SHIPPED, folder / "adapter", 3)
        return SHIPPED
    model = tiny_models.save("qwen3", folder / "m", vocab_size=272)
    for file in SHIPPED.glob("tokenizer*"):
        shutil.copy(file, model)
    return model


@pytest.mark.parametrize("name", CASES)
def test_endpoints_answer_as_those_of_bf16_vllm(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    ask, options, answered = CASES[name]
    model, found = model_of(name, tmp_path), []
    for kind, more in (("bf16", ()), ("dfloat11", OURS)):
        log = tmp_path / f"{kind}.log"
        with server(model, log, *options, *more) as url:
            wait_until_ready(url, log)
            found.append(ask(url, tmp_path))
    bf16, ours = found
    assert [request for request in bf16 if ours[request] != bf16[request]] == []
    assert {request for request in answered if isinstance(bf16[request], dict)} == answered


def test_vllms_benchmarks_run_on_compressed_weights(tmp_path: Path) -> None:
    model = tiny_models.save(
        "llama", tmp_path / "m", vocab_size=10_000
    )  # the benchmark's prompts need as many
    for file in SHIPPED.glob("tokenizer*"):
        shutil.copy(file, model)
    random = ["--dataset-name", "random", "--random-input-len", "8", "--random-output-len", "4"]
    iterations = ["--batch-size", "2", "--num-iters", "2", "--num-iters-warmup", "1"]
    short = [*iterations, "--input-len", "8", "--output-len", "4"]
    for kind, how in (("throughput", ["--num-prompts", "3", *random]), ("latency", short)):
        result = tmp_path / f"{kind}.json"
        options = ("--model", str(model), "--enforce-eager", "--max-model-len", "128", *OURS)
        done = bench(kind, *options, *how, "--output-json", str(result))
        assert done.returncode == 0, done.stderr[-3000:]
        assert "dfloat11: compressed 10 of 10 layers" in done.stdout + done.stderr
        assert result.exists()
    log = tmp_path / "server.log"
    with server(model, log, *OURS) as url:
        wait_until_ready(url, log)
        where = ("--base-url", url, "--model", "m", "--tokenizer", str(SHIPPED))
        done = bench("serve", *where, "--num-prompts", "3", *random)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"Successful requests: +3\b", done.stdout)


def bench(kind: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "vllm"), "bench", kind, *options]
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
