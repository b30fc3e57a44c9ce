"""Write a checkpoint of random weights with a real model's shapes, for the benchmarks.

    python scripts/bench_serve_model.py SHAPE FOLDER

BF16, matrices N(0, 0.02) as models are initialised (trained ones compress nearly alike), norms 1, one safetensors file
per transformer block, no tokenizer.
"""

import sys
from pathlib import Path

from bench.serve.model import BenchError, write_random

if __name__ == "__main__":
    try:
        write_random(sys.argv[1], Path(sys.argv[2]))
    except BenchError as trouble:
        print(trouble, file=sys.stderr)
        sys.exit(2)
