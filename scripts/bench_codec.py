"""Measure the CPU codec of both layouts: MB/s of BF16 per core, and bits per weight, after comparing the bits.

    python scripts/bench_codec.py [--rows 4096 --cols 4096] [--json FILE]

One thread; the median of several runs; weights N(0, 0.02).
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["VLLM_DFLOAT_THREADS"] = "1"

import numpy as np
from bench.results import processor, write_json

from vllm_dfloat.codec import fast_decode, fast_encode
from vllm_dfloat.codec.decode import decode
from vllm_dfloat.codec.encode import count_exponents, encode
from vllm_dfloat.codec.huffman import code_lengths
from vllm_dfloat.codec.layout import LANE_LENGTH_UNIT, PAD_WORDS, PackedTensor

RUNS = 7


def median_seconds(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def parts(packed: PackedTensor, weight: np.ndarray) -> dict[str, float]:
    """Return the bits per weight of each section of a packed matrix."""
    lay = packed.layout
    counts = count_exponents(weight.reshape(-1))
    code = int(counts @ code_lengths(counts, lay.code_bits).astype(np.int64))
    lanes = int(packed.lane_lengths.sum(dtype=np.int64)) * LANE_LENGTH_UNIT
    bits = {
        "sign and mantissa": 8 * lay.padded_numel,
        "code": code,
        "lane lengths": 8 * packed.lane_lengths.size,
        "rounding of lanes": lanes - code,
        "rounding of tiles": 32 * (lay.num_words - PAD_WORDS) - lanes,
        "tile starts": 8 * (lay.words_offset - lay.tile_starts_offset),
        "lut and padding": 8 * lay.sign_mantissa_offset + 32 * PAD_WORDS,
    }
    return {name: round(value / lay.numel, 4) for name, value in bits.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((args.rows, args.cols)) * 0.02).astype(np.float32)
    weight = (values.view(np.uint32) >> 16).astype(np.uint16)
    packed = encode(weight)
    fast = fast_encode.encode(weight)
    assert fast is not None  # such weights are held so
    if not all(
        np.array_equal(found, weight) for found in (decode(packed), fast_decode.decode(fast))
    ):
        print(
            "DIFFERENT: the decoded bits are not the encoded ones; no time is reported",
            file=sys.stderr,
        )
        return 1
    megabytes = weight.nbytes / 1e6
    counts = count_exponents(weight.reshape(-1))
    result = {
        "shape": [args.rows, args.cols],
        "bits_per_weight": round(packed.bits_per_weight, 4),
        "bits_per_weight_by_part": parts(packed, weight),
        "code_bits_per_weight_by_limit": {
            limit: round(float(counts @ code_lengths(counts, limit)) / weight.size, 4)
            for limit in range(8, 13)
        },
        "encode_mb_per_s": round(megabytes / median_seconds(lambda: encode(weight))),
        "decode_mb_per_s": round(megabytes / median_seconds(lambda: decode(packed))),
        "fast": {
            "bits_per_weight": round(fast.bits_per_weight, 4),
            "encode_mb_per_s": round(
                megabytes / median_seconds(lambda: fast_encode.encode(weight))
            ),
            "decode_mb_per_s": round(megabytes / median_seconds(lambda: fast_decode.decode(fast))),
        },
        "processor": processor(),
        "threads": 1,
    }
    print(json.dumps(result, indent=1))
    write_json(args.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
