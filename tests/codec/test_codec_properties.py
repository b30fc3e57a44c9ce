"""Over 10,000 tensors through both encoders and decoders: the output has the bits of the input."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
from dfloat11_helpers import config
from fuzz.folder import Stored, pack
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_rules import assert_follows_layout
from weight_strategies import BLOCK_BITS, REACHED, Spec, features, specs

from vllm_dfloat.checkpoint.reader import open_checkpoint
from vllm_dfloat.codec import reference
from vllm_dfloat.codec.decode import decode
from vllm_dfloat.codec.encode import encode
from vllm_dfloat.codec.layout import MAX_CODE_BITS
from vllm_dfloat.dfloat11 import reference as reference_unit
from vllm_dfloat.dfloat11.decode import decode_unit
from vllm_dfloat.dfloat11.encode import encode_unit
from vllm_dfloat.dfloat11.format import FIELDS
from vllm_dfloat.dfloat11.unit import Unit
from vllm_dfloat.errors import UnsupportedError

BATCH = (
    10  # tensors per example; hypothesis's own work per example takes longer than a small tensor
)
REFERENCE = 400  # weights up to which the slow reference decodes too
EXAMPLES = settings(deadline=None, derandomize=True, database=None)


def as_matrix(flat: np.ndarray, seed: int) -> np.ndarray:
    """Return the weights as a matrix of some shape."""
    rows = next(rows for rows in (seed % 9 + 1, 1) if flat.size % rows == 0)
    matrix = flat.reshape(rows, flat.size // rows)
    return matrix if seed % 2 else np.ascontiguousarray(matrix.T)


def test_the_packed_codec_gives_back_any_tensor() -> None:
    seen: Counter[str] = Counter()

    @settings(EXAMPLES, max_examples=600)
    @given(st.lists(specs(5000), min_size=BATCH, max_size=BATCH))
    def holds(batch: list[Spec]) -> None:
        for spec in batch:
            weight = as_matrix(spec.bits(), spec.seed)
            packed = encode(weight, "w")
            assert_follows_layout(packed)
            assert np.array_equal(decode(packed), weight)
            if weight.size <= REFERENCE:
                assert np.array_equal(reference.decode(packed), weight)
            seen.update(["tensors", *features(weight.reshape(-1))])
            seen["raw"] += packed.is_raw
            seen["longest codes"] += packed.layout.code_bits == MAX_CODE_BITS and not packed.is_raw

    holds()
    assert seen["tensors"] >= 6000
    assert [name for name in (*REACHED, "raw", "longest codes") if not seen[name]] == []


def test_the_official_codec_gives_back_any_unit_that_it_takes(tmp_path: Path) -> None:
    seen: Counter[str] = Counter()

    @settings(EXAMPLES, max_examples=500)
    @given(st.lists(specs(2500), min_size=BATCH, max_size=BATCH))
    def holds(batch: list[Spec]) -> None:
        units = {f"u{i}": spec.bits(limit=240) for i, spec in enumerate(batch)}
        encoded = {}
        for (name, flat), spec in zip(units.items(), batch, strict=True):
            members = np.split(flat, split_at(flat.size, spec.seed))
            try:
                encoded[name] = encode_unit(members, name)
            except UnsupportedError as error:
                seen["empty" if not flat.size else str(error).split()[2]] += 1
        for name, unit in read_back(tmp_path, encoded).items():
            flat = units[name]
            assert np.array_equal(decode_unit(unit), flat)
            if flat.size <= REFERENCE:
                assert np.array_equal(reference_unit.decode(unit), flat)
            seen.update(["tensors", *features(flat), *tail_features(unit, flat)])

    holds()
    assert seen["tensors"] >= 4000
    tails = [f"ends at bit {bit} of a window" for bit in range(64)]
    others = [
        "codes over 16 bits",
        "several blocks",
        "ends a block",
        "one past a block",
        "empty",
        "child",
    ]
    wanted = [name for name in REACHED if name not in NOT_IN_THE_FORMAT]
    assert [name for name in (*wanted, *tails, *others) if not seen[name]] == []


NOT_IN_THE_FORMAT = (
    "0 weights",
    "all 256 exponents",
    "Inf",
    "NaN",
    "exponents of 240 and more",
    *("4095 weights", "4096 weights", "4097 weights"),  # the reference takes longer for them
)


def split_at(size: int, seed: int) -> list[int]:
    """Return where a unit of 1 to 3 members is split; none is empty."""
    cuts = {1 + seed % 5, size // 2}
    return sorted(cut for cut in cuts if seed % 3 and 0 < cut < size)


def read_back(folder: Path, encoded: dict[str, dict[str, np.ndarray]]) -> dict[str, Unit]:
    """Write units to a file, and return them as the reader accepts them."""
    dtypes = {field: dtype for field, (dtype, _) in FIELDS.items()}
    tensors = [
        Stored(f"{name}.{field}", dtypes[field], list(array.shape), array.tobytes())
        for name, fields in encoded.items()
        for field, array in fields.items()
    ]
    if not tensors:
        return {}
    members = {
        name: [f"m{i}" for i in range(fields["split_positions"].size + 1)]
        for name, fields in encoded.items()
    }
    (folder / "model.safetensors").write_bytes(pack(tensors))
    (folder / "config.json").write_text(json.dumps({"dfloat11_config": config(members)}))
    return {name: entry.load() for name, entry in open_checkpoint(folder).units.items()}


def tail_features(unit: Unit, flat: np.ndarray) -> list[str]:
    """Return features of the end of a unit's codes, computed from the code lengths in its tables."""
    bits = int(unit.luts[-1][flat >> 7 & 0xFF].astype(np.int64).sum())
    found = [f"ends at bit {bits % 64} of a window"]
    if unit.luts[-1].max() > 16:
        found.append("codes over 16 bits")
    if unit.num_blocks > 1:
        found.append("several blocks")
    if bits % BLOCK_BITS == 0:
        found.append("ends a block")
    if bits % BLOCK_BITS == 1:
        found.append("one past a block")
    return found
