"""Launch the decode kernel eight times on a layer of real size, for a profiler.

ncu -k regex:_decode_kernel -s 4 -c 1 python scripts/launch_decode.py
"""

import argparse
import sys

from bench_setup import CannotRunError, normal, prepare


def main() -> int:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    try:
        device = prepare("cuda")
    except CannotRunError as error:
        print(f"launch_decode: cannot run: {error}", file=sys.stderr)
        return 2
    from bench.kernels.decode import buffers

    from vllm_dfloat.device import ops

    rows, cols = 14_336, 4096
    packed = ops.pack(normal(rows, cols, device), "w")
    out = buffers(packed)
    for _ in range(8):
        ops.decode(packed.desc, rows, cols, *out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
