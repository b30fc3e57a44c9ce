"""The promise over HTTP: `vllm serve` and the OpenAI client."""

import json
import re
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from servers import complete, server, wait_until_ready
from tiny_models import SHIPPED

pytestmark = pytest.mark.engine


def check_weights(url: str) -> dict[str, Any]:
    """Return the report of the check of a live server, requested as in docs/checks.md."""
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
