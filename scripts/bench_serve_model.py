"""Write a checkpoint of random weights with a real model's shapes, for the benchmarks.

    python scripts/bench_serve_model.py SHAPE FOLDER

BF16, matrices N(0, 0.02) as models are initialised (trained ones compress nearly alike), norms 1, one safetensors file
per transformer block, no tokenizer.
"""

import argparse
import sys
from pathlib import Path

from bench.serve.model import SHAPES, BenchError, write_random

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Write a checkpoint of random weights for benchmarks."
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path, help="where to write it")
    args = parser.parse_args()
    try:
        write_random(args.shape, args.folder)
    except BenchError as trouble:
        print(trouble, file=sys.stderr)
        sys.exit(2)
