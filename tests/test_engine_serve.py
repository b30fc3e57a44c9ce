"""The promise over HTTP: `vllm serve` and the OpenAI client."""

import json
import os
import re
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from engines import start
from tiny_models import SHIPPED

pytestmark = pytest.mark.engine

READY_SECONDS = 300
PROMPT = "def read_lines(path):\n    "


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def server(model: Path, log: Path, *options: str) -> Iterator[str]:
    """Start `vllm serve` and give its URL at once; it is not ready yet. One with --headless has no URL."""
    port = free_port()
    command = ["vllm", "serve", str(model), "--served-model-name", "m", "--port", str(port)]
    command += ["--enforce-eager", "--max-model-len", "128", "--max-logprobs", "-1", *options]
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_SERVER_DEV_MODE": "1",  # for /collective_rpc
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    with start(command, log, environment) as process:
        yield f"http://127.0.0.1:{port}"
        # a headless one may end with the one that it belongs to
        assert "--headless" in options or process.poll() is None, log.read_text()[-4000:]


def wait_until_ready(url: str, log: Path) -> None:
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"not ready after {READY_SECONDS} s: {log.read_text()[-4000:]}")


def complete(url: str) -> dict[str, Any]:
    from openai import OpenAI

    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        completion = client.completions.create(
            model="m",
            prompt=PROMPT,
            max_tokens=12,
            temperature=0,
            logprobs=20,
            extra_body={
                "prompt_logprobs": 20,
                "ignore_eos": True,
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,  # texts of tokens may coincide
            },
        )
    return completion.choices[0].model_dump()


def check_weights(url: str) -> dict[str, Any]:
    """Return what the check of a live server reports, as docs/checks.md asks for it."""
    request = urllib.request.Request(
        f"{url}/collective_rpc",
        data=json.dumps({"method": "check_dfloat11_weights"}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        (report,) = json.load(response)["results"]
    return dict(report)


def test_server_answers_as_a_bf16_server(tmp_path: Path) -> None:
    logs = tmp_path / "bf16.log", tmp_path / "dfloat11.log"
    options = ["--quantization", "dfloat11"]
    options += ["--additional-config", '{"dfloat11": {"ignore": ["re:.*layers.1.*"]}}']
    with ExitStack() as stack:
        urls = [
            stack.enter_context(server(SHIPPED, logs[0])),
            stack.enter_context(server(SHIPPED, logs[1], *options)),
        ]
        for url, log in zip(urls, logs, strict=True):
            wait_until_ready(url, log)
        plain, compressed = (complete(url) for url in urls)
        report = check_weights(urls[1])
    assert report["damaged"] == []
    assert len(plain["token_ids"]) == 12
    assert len(plain["logprobs"]["top_logprobs"][0]) >= 20
    assert compressed == plain
    lines = [line for line in logs[1].read_text().splitlines() if "dfloat11: compressed" in line]
    assert len(lines) == 1
    num_compressed, num_layers = map(
        int, re.findall(r"compressed (\d+) of (\d+) layers", lines[0])[0]
    )
    assert report["tensors"] == num_compressed
    assert num_layers - num_compressed == 4  # qkv, o, gate_up and down of the ignored layer
