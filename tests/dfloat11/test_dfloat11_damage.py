"""Random damage anywhere in a checkpoint: the stated number of weights, or an error of one sentence."""

import os
import subprocess
import sys
from pathlib import Path

# Runs in its own process with a time limit, so that a hang or a crash is a failure and not the end
# of the test run; numba checks every index there, so an access outside an array is a failure too.
_DAMAGE = """
import json, sys
from pathlib import Path
import numpy as np
from dfloat11_helpers import encode, stored_unit, write_checkpoint
from vllm_dfloat.dfloat11.decode import decode_unit
from vllm_dfloat.checkpoint.reader import open_checkpoint
from vllm_dfloat.checkpoint.weights import iter_weights
from vllm_dfloat.errors import DFloatError

path = Path(sys.argv[1])
units = {n: stored_unit("edge-good", n) for n in ("odd77", "rows18", "tail_block_aligned")}
units["block"] = stored_unit("edge-good", "block")
patterns = {"block": ["a", "b", "c"], "odd77": [], "rows18": [], "tail.*": []}
write_checkpoint(path, units, patterns)
file = path / "model.safetensors"
good = file.read_bytes()
header = int.from_bytes(good[:8], "little") + 8
entries = {k: v["data_offsets"] for k, v in json.loads(good[8:header]).items()}
rng = np.random.default_rng(0)
counts = {"decoded": 0, "refused": 0}

def attempt(data):
    file.write_bytes(data)
    try:
        checkpoint = open_checkpoint(path)
        sizes = {name: entry.num_weights for name, entry in checkpoint.units.items()}
        total = sum(bits.size for _, bits in iter_weights(checkpoint, SHAPES))
        assert total == sum(sizes.values()), (total, sizes)
        counts["decoded"] += 1
    except DFloatError as error:
        text = str(error)
        assert text[-1] == "." and ": " in text, text
        counts["refused"] += 1

SHAPES = {"block.a": (64, 48), "block.b": (16, 33), "block.c": (5, 101), "odd77": (7, 11),
          "rows18": (96, 128), "tail_block_aligned": (2, 8167)}
attempt(good)
assert counts == {"decoded": 1, "refused": 0}
regions = [(0, 8), (8, header)] + [(header + a, header + b) for a, b in entries.values() if b > a]
for begin, end in regions:
    for flips in [1] * 12 + [5] * 4:
        data = bytearray(good)
        for _ in range(flips):
            data[rng.integers(begin, end)] ^= 1 << rng.integers(0, 8)
        attempt(bytes(data))
    data = bytearray(good)
    data[begin:end] = rng.bytes(end - begin)
    attempt(bytes(data))
for _ in range(40):
    attempt(good[: rng.integers(0, len(good))])
print(json.dumps(counts))

# The same below the file's checks: shortened tensors that still fit together.
for name, field in [(n, f) for n in units for f in ("encoded_exponent", "sign_mantissa")]:
    for cut in (1, 3, 9):
        stored = dict(units[name])
        stored[field] = stored[field][: max(1, stored[field].size - cut)]
        if field == "sign_mantissa":
            positions = stored["output_positions"].copy()
            positions.view("<u4")[-1] = stored[field].size
            stored["output_positions"] = positions
        write_checkpoint(path, {name: stored}, patterns)
        try:
            unit = open_checkpoint(path).units[name].load()
            assert decode_unit(unit).size == stored["sign_mantissa"].size
        except DFloatError:
            pass
print("done")
"""


def test_damaged_checkpoints_are_refused_or_decode_to_the_stated_count(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = {
        **os.environ,
        "PYTHONPATH": path,
        "NUMBA_BOUNDSCHECK": "1",
        "NUMBA_CACHE_DIR": str(tmp_path / "numba"),  # code with and without checks must not mix
    }
    done = subprocess.run(
        [sys.executable, "-c", _DAMAGE, str(tmp_path / "model")],
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    counts, last = done.stdout.splitlines()
    assert last == "done"
    # Most damage is detected; damage of sign_mantissa and of unused gaps cannot be.
    assert '"decoded": 0' not in counts
    assert '"refused": 0' not in counts
