"""Launch the decode kernel eight times on a layer of real size, for a profiler.

ncu -k regex:_decode_kernel -s 4 -c 1 python scripts/launch_decode.py
"""

from bench_setup import normal, prepare


def main() -> None:
    device = prepare("cuda")
    from bench.kernels.decode import buffers

    from vllm_dfloat.device import ops

    rows, cols = 14_336, 4096
    packed = ops.pack(normal(rows, cols, device), "w")
    out = buffers(packed)
    for _ in range(8):
        ops.decode(packed.desc, rows, cols, *out)


if __name__ == "__main__":
    main()
