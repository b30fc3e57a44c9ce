"""Compare the bits of cuBLASLt without split-K, as vLLM sets it up on Hopper, with products in a known order.

    python scripts/probe_order.py [--device cpu] [--output FILE]

Under VLLM_BATCH_INVARIANT vLLM multiplies linear layers and LM heads by its own Triton kernel, on sm_90 and sm_100 too
(docs/exactness.md); for other products it sets cuBLASLt there, without split-K. This script makes the same settings.
The product beside it has one FP32 accumulator and takes columns in order, as many at a time as the tensor cores do. The
fused product with the fast layout takes them in another order inside each 64; here the columns of both operands are
put in the order in which it multiplies 16 neighbours at a time (`fused`), and left as they are (`fused, own order`).
Printed are the numbers of unequal results. Rows of 2**25, 1 and -2**25 show any other order at once.
"""

import argparse
import json
import os
import sys
from pathlib import Path

# Before cuBLAS is loaded; as vLLM 0.33 does in model_executor/determinism/batch_invariant.py.
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
os.environ["CUBLASLT_WORKSPACE_SIZE"] = "1"

from bench_setup import CannotRunError, environment, prepare

SHAPES = ((4096, 4096), (28_672, 4096), (4096, 14_336), (6144, 4096), (1024, 4096), (4096, 1024))
NUM_X = (1, 2, 8, 16, 17, 32, 64, 128, 256)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, help="a JSON file")
    args = parser.parse_args()
    try:
        device = prepare(args.device)
    except CannotRunError as error:
        print(f"probe_order: cannot run: {error}", file=sys.stderr)
        return 2
    from bench.kernels import order

    facts = environment(device)
    rows = []
    small = device.type == "cpu"
    order.set_batch_invariant(device)
    for shape in ((64, 256),) if small else SHAPES:
        for row in order.compare(*shape, (1, 4) if small else NUM_X, device):
            print(row, flush=True)
            rows.append(row)
            if args.output:
                args.output.write_text(json.dumps({"environment": facts, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
