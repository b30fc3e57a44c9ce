"""Start `vllm serve` in a session of its own, and a tokenizer for random weights."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

START = "import sys; from vllm.entrypoints.cli.main import main; sys.argv[0] = 'vllm'; main()"
KV_CACHE = re.compile(r"KV cache size: ([\d,]+) tokens")


class ServerError(Exception):
    """A server did not start, or no time was left for it."""


class Server:
    """A running `vllm serve`; a context manager that stops it with all its processes.

    Attributes:
        url: where it listens.
    """

    def __init__(self, model: Path, engine: dict[str, Any], log: Path) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        command = [
            sys.executable,
            "-c",
            START,
            "serve",
            str(model),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [*command, *flags(engine)],
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    def wait_until_ready(self, until: float) -> None:
        """Return once requests are answered; raise ServerError if it ends, or at the time `until`."""
        while time.time() < until:
            if self._process.poll() is not None:
                lines = self._log.read_text(errors="replace").strip().splitlines() or ["nothing"]
                raise ServerError(
                    f"vllm serve ended with status {self._process.returncode}; it said: {lines[-1][:300]}"
                )
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.3)
        raise ServerError("the budget was spent before vllm serve was ready")

    def kv_cache_tokens(self) -> int | None:
        """Return how many tokens its KV cache holds, as it logged; None if it did not."""
        found = KV_CACHE.findall(self._log.read_text(errors="replace"))
        return int(found[-1].replace(",", "")) if found else None


def flags(engine: dict[str, Any]) -> list[str]:
    """Return arguments of LLM() as those of `vllm serve`."""
    found = []
    for name, value in engine.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            found += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return found


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a tokenizer of `vocab_size` words "t0", "t1" ... into `folder`, unless it has one."""
    if (folder / "tokenizer.json").exists():
        return
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocab_size)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
