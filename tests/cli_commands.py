"""One successful call of every command, and the small model that the calls use."""

import json
from pathlib import Path

from fuzz.folder import Stored, pack
from helpers import gaussian

from vllm_dfloat.cli import main

CONFIG = Path(__file__).parent / "data" / "configs" / "Llama-3.1-8B.json"
# {bf16} is a model, {df11} the same compressed, {new} a folder that is not there.
COMMANDS = {
    "compress": ["compress", "{bf16}", "{new}"],
    "decompress": ["decompress", "{df11}", "{new}"],
    "inspect": ["inspect", "{df11}"],
    "verify": ["verify", "{df11}", "--against", "{bf16}"],
    "plan": ["plan", "{config}", "--gpu-memory", "24GiB"],
}


def make_places(root: Path) -> dict[str, Path]:
    """Make the folders that the arguments of COMMANDS name; return them by these names."""
    bf16 = root / "bf16"
    bf16.mkdir()
    shapes = {"model.layers.0.mlp.up_proj.weight": (64, 48), "model.embed_tokens.weight": (96, 32)}
    tensors = [
        Stored(name, "BF16", list(shape), gaussian(*shape).tobytes())
        for name, shape in shapes.items()
    ]
    (bf16 / "model.safetensors").write_bytes(pack(tensors))
    (bf16 / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    assert main(["compress", str(bf16), str(root / "df11"), "--quiet"]) == 0
    return {"bf16": bf16, "df11": root / "df11", "config": CONFIG}


def only_line(text: str) -> str:
    """Return the line of a text, which must have exactly one."""
    (line,) = text.splitlines()
    assert line.isprintable()
    return line
