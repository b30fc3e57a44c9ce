"""Serve a model with `vllm serve` from DFloat11 weights, then from BF16, and compare the two answers exactly.

Called by quickstart.sh, which makes the environment. Exit status: 0 identical, or nothing to compare with;
1 different, or a server did not answer.
"""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROMPT = "Return the "
MAX_TOKENS = 64
MAX_LEN = 1024
START_SECONDS = 1800  # limit until the server is ready, including the download of a hub model
LOG_TAIL_LINES = 30
# The plugin's line about the loaded model, "dfloat11: compressed ... (BF16 -> held bytes)".
BYTES_IN_LOG = re.compile(r"dfloat11: compressed .*\((\d+) -> (\d+) bytes\)")


class QuickstartError(Exception):
    """An error with a message for the person at the terminal."""


def read_config(model: str) -> dict[str, Any]:
    """Return config.json of a local folder or a hub id."""
    path = Path(model) / "config.json"
    if not Path(model).is_dir():
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(model, "config.json"))
        except (OSError, ValueError) as error:
            raise QuickstartError(
                f"{model}: no such folder, and not found on the hub; expected either.\n{error}"
            ) from error
    if not path.is_file():
        raise QuickstartError(
            f"{path}: not found; expected a model folder. Give a folder with config.json or a hub id."
        )
    config: dict[str, Any] = json.loads(path.read_text())
    return config


def free_port() -> int:
    """Return a free port on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def tail(log: Path) -> str:
    """Return the last lines of a server's log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])


def wait_until_ready(server: subprocess.Popen[bytes], url: str) -> None:
    """Return when the server answers /health; raise if it does not."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise QuickstartError(f"vllm serve ended with status {server.returncode}; see above.")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise QuickstartError(f"vllm serve was not ready after {START_SECONDS} s; see above.")


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server, then all processes left in its group: workers must not outlive it."""
    for sign, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        try:
            os.killpg(server.pid, sign)
            server.wait(seconds)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


@contextmanager
def serving(model: str, max_len: int, options: list[str], log: Path) -> Iterator[str]:
    """Run `vllm serve` inside the `with` statement and yield its URL.

    A QuickstartError from the start or from the enclosed code is prefixed with the end of the server's log.
    """
    port = free_port()
    command = ["vllm", "serve", model, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "model", "--max-model-len", str(max_len), *options]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        **os.environ,
    }  # GiB; without it vLLM takes 92 % of the memory
    if Path(model).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    print("$", " ".join([*command[:3], *options]), file=sys.stderr, flush=True)
    print(
        f"  (its log until the end: {log}; a start takes a minute or two)",
        file=sys.stderr,
        flush=True,
    )
    with log.open("wb") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(server, url)
        yield url
    except QuickstartError as error:
        raise QuickstartError(f"{tail(log)}\n{error}") from error
    finally:
        stop(server)


def complete(url: str) -> dict[str, Any]:
    """Return the first choice of one greedy completion, with logprobs."""
    body = {
        "model": "model",
        "prompt": PROMPT,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "logprobs": 5,
        "return_tokens_as_token_ids": True,  # tokens that are not text alone would have equal names
    }
    request = urllib.request.Request(
        f"{url}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=600) as response:
            choice: dict[str, Any] = json.load(response)["choices"][0]
    except urllib.error.HTTPError as error:
        raise QuickstartError(
            f"{url}: status {error.code}: {error.read().decode(errors='replace')}"
        ) from error
    return choice


def weight_bytes(log: Path) -> tuple[int, int]:
    """Return the model's weight bytes (as BF16, as held) that the plugin logged."""
    found = BYTES_IN_LOG.findall(log.read_text(errors="replace"))
    if not found:
        raise QuickstartError(
            f"{tail(log)}\nno line 'dfloat11: compressed ...' in the log of vllm serve: "
            "the weights were not compressed. Is vllm-dfloat installed in this environment?"
        )
    bf16, held = found[-1]
    return int(bf16), int(held)


def compare(compressed: dict[str, Any], plain: dict[str, Any]) -> bool:
    """Return whether text, tokens and all logprobs are equal, exactly."""
    return all(compressed[key] == plain[key] for key in ("text", "finish_reason", "logprobs"))


def run(model: str, original: str | None) -> int:
    """Do what the module says and return the exit status."""
    config = read_config(model)
    official = "dfloat11_config" in config
    # Short: the KV cache of a long context may not fit in memory with the weights.
    max_len = min(MAX_LEN, config.get("max_position_embeddings", MAX_LEN))
    plain_model = original if official or original else model
    with tempfile.TemporaryDirectory(prefix="quickstart-") as folder:
        log = Path(folder) / "dfloat11.log"
        with serving(model, max_len, ["--quantization", "dfloat11"], log) as url:
            compressed = complete(url)
        bf16_bytes, held_bytes = weight_bytes(log)
        plain = None
        if plain_model is not None:
            with serving(plain_model, max_len, [], Path(folder) / "bf16.log") as url:
                plain = complete(url)

    print(f"\nprompt    {PROMPT!r}\nDFloat11  {compressed['text']!r}")
    if plain is not None:
        print(f"BF16      {plain['text']!r}")
    print(
        f"\nweights in memory: BF16 {bf16_bytes:,} bytes, DFloat11 {held_bytes:,} bytes, "
        f"ratio {held_bytes / bf16_bytes:.4f}"
    )
    if plain is None:
        print(
            f"not compared: {model} is a DFloat11 checkpoint, which BF16 vLLM cannot serve; "
            "give its BF16 original as second argument."
        )
        return 0
    count = len(compressed["logprobs"]["token_logprobs"])
    same = compare(compressed, plain)
    print(f"{'identical' if same else 'DIFFERENT'} (text and logprobs of {count} tokens)")
    return 0 if same else 1


def main() -> None:
    parser = argparse.ArgumentParser(prog="quickstart.sh", description=__doc__)
    parser.add_argument("model", help="BF16 or DFloat11 model: local folder or hub id")
    parser.add_argument("original", nargs="?", help="what to compare with; default: the model")
    args = parser.parse_args()
    for sign in (signal.SIGTERM, signal.SIGHUP):  # leave through `finally`: the servers are stopped
        signal.signal(sign, lambda number, _: sys.exit(128 + number))
    try:
        sys.exit(run(args.model, args.original))
    except QuickstartError as error:
        sys.exit(f"{error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
