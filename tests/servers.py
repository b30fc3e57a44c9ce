"""Start `vllm serve` and ask it for a completion."""

import os
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engines import start

READY_SECONDS = 300
PROMPT = "def read_lines(path):\n    "


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def server(model: Path, log: Path, *options: str) -> Iterator[str]:
    """Start `vllm serve` and yield its URL before it is ready. A server with --headless has no URL."""
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
        # a headless server may end together with its main server
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
