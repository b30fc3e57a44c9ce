"""The checkpoints that a fuzz run damages: small official ones from the test vectors, and some made here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fuzz.folder import Folder, Stored, pack, read_folder, unpack

from vllm_dfloat.checkpoint.manifest import MANIFEST_FILE
from vllm_dfloat.convert.compress import compress
from vllm_dfloat.convert.decompress import decompress
from vllm_dfloat.convert.source import open_source

VECTORS = Path(__file__).parents[2] / "tests" / "data" / "vectors"
# Units of the vectors: short ones, one with three members, and one of two thread blocks.
_SHORT = (
    "two_elements",
    "nine",
    "odd77",
    "two_symbols",
    "tail_byte_aligned",
    "tail_straddle_window_eof",
)
_SMALL_CONFIG = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Base:
    """A checkpoint to start from.

    Attributes:
        name: for reports.
        files: its files.
        original: folder of the BF16 model that it decodes to.
        share: how often it is chosen, relative to the others.
    """

    name: str
    files: Folder
    original: Path
    share: int = 2


def make_bases(root: Path) -> list[Base]:
    """Make all bases; the originals are written to folders in `root`."""
    made = _model(root / "model", _layer_shapes())
    experts = _model(root / "experts", _expert_shapes())
    compress(open_source(made), root / "made", workers=1)
    compress(open_source(experts), root / "fused", workers=1)
    decompress(root / "made", root / "plain", shard_bytes=12_000)
    return [
        _official("official", root, _SHORT),
        _official("official in files", root, ("odd77", "block"), one_file=False),
        _official("official blocks", root, ("tail_straddle_block_eof",), share=1),
        Base("compressed here", read_folder(root / "made"), made, 3),
        Base("compressed here, no manifest", without_manifest(root / "made"), made),
        Base("experts in one tensor", read_folder(root / "fused"), experts),
        Base("plain with an index", read_folder(root / "plain"), root / "plain"),
    ]


def without_manifest(path: Path) -> Folder:
    return {k: v for k, v in read_folder(path).items() if k != MANIFEST_FILE}


def _official(
    name: str, root: Path, units: tuple[str, ...], one_file: bool = True, share: int = 2
) -> Base:
    tensors = unpack((VECTORS / "edge-good-df11/model.safetensors").read_bytes())
    config = json.loads((VECTORS / "edge-good-df11/config.json").read_text())
    patterns = config["dfloat11_config"]["pattern_dict"]
    config["dfloat11_config"]["pattern_dict"] = {unit: patterns[unit] for unit in units}
    parts = {unit: [t for t in tensors if t.name.rpartition(".")[0] == unit] for unit in units}
    files: Folder = {"config.json": json.dumps(config).encode()}
    if one_file:
        files["model.safetensors"] = pack([tensor for part in parts.values() for tensor in part])
    else:
        files.update({f"{unit}.safetensors": pack(part) for unit, part in parts.items()})
    originals = unpack((VECTORS / "edge-good-bf16/original.safetensors").read_bytes())
    folder = root / f"{name} original"
    folder.mkdir(parents=True)
    wanted = [t for t in originals if t.name.split(".")[0] in units]
    (folder / "model.safetensors").write_bytes(pack(wanted))
    return Base(name, files, folder, share)


def _layer_shapes() -> dict[str, tuple[int, ...]]:
    layer = {"self_attn.q_proj": (32, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48)}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (64, 32),
        "lm_head.weight": (64, 32),
        "model.norm.weight": (32,),
    }
    for i in range(2):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (32,)
    return shapes


def _expert_shapes() -> dict[str, tuple[int, ...]]:
    return {
        "model.layers.0.mlp.experts.gate_up_proj": (3, 32, 24),
        "model.layers.0.mlp.experts.down_proj": (3, 12, 32),
        "model.layers.0.mlp.gate.weight": (3, 32),
        "model.layers.0.self_attn.q_proj.weight": (48, 32),
    }


def _model(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """Write a BF16 model of these shapes."""
    rng = np.random.default_rng(11)
    tensors = []
    for name, shape in sorted(shapes.items()):
        words = (rng.standard_normal(shape) * 0.02).astype(np.float32).view(np.uint32) >> 16
        tensors.append(Stored(name, "BF16", list(shape), words.astype("<u2").tobytes()))
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(pack(tensors))
    (folder / "config.json").write_text(json.dumps(_SMALL_CONFIG))
    (folder / "tokenizer.json").write_text('{"model": {}}')
    return folder
