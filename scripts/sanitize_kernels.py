"""Launch every kernel on small sizes and compare the bits: what compute-sanitizer runs, and what compiles them all.

    compute-sanitizer --tool memcheck python scripts/sanitize_kernels.py
    python scripts/sanitize_kernels.py packed_decode encoder    # these checks only
    python scripts/sanitize_kernels.py --share 0/4     # every fourth check, so that 4 processes compile in parallel
    python scripts/sanitize_kernels.py --device cpu    # in Triton's interpreter

Prints a line per check; a failed check does not stop the others. Exit status 0 all right, 1 wrong bits or a kernel that
does not compile or launch, 2 it cannot run here.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from bench_setup import CannotRunError, normal, prepare

if TYPE_CHECKING:
    import torch

ROWS, COLS = 37, 333  # the last tile is partly filled


def some_rows(weight: torch.Tensor) -> torch.Tensor:
    """Return the first row, the last and another one; in the interpreter, where a row takes a second, only one."""
    import torch

    rows = weight.shape[0]
    chosen = [0, rows - 1, rows // 2] if weight.is_cuda else [rows - 1]
    return torch.tensor(chosen, device=weight.device)


def packed_decode(device: torch.device) -> None:
    from bench.kernels.decode import check_decode

    from vllm_dfloat.device import ops

    weight = normal(ROWS, COLS, device)
    check_decode(ops.pack(weight, "w"), weight, "decode", ops.decode)


def packed_rows(device: torch.device) -> None:
    """Check rows without a status, as for an embedding look-up, and with a status word per tile."""
    from bench.kernels.decode import check_rows
    from bench.kernels.timing import expect_same_bits
    from bench_setup import nan_memory

    from vllm_dfloat.device import ops

    weight = normal(ROWS, COLS, device)
    packed, ids = ops.pack(weight, "w"), some_rows(weight)
    check_rows(packed, weight, ids, "decode_rows", ops.decode_rows)
    with nan_memory():
        found = ops.unpack_rows(packed, ids)
    expect_same_bits(found, weight[ids], "unpack_rows")


def packed_group(device: torch.device) -> None:
    """Check a group with members that end within a program, and one of a single weight."""
    from bench.kernels.groups import Group

    shapes = [(ROWS, COLS), (1, 1), (12, 700)]
    Group([normal(*shape, device, seed=i) for i, shape in enumerate(shapes)]).check("decode_group")


def fast_group(device: torch.device) -> None:
    """Check a group with members of every factor of columns, escapes and a raw tile; and one of whole blocks."""
    from bench.kernels.groups import FastGroup

    shapes = [(200, 650), (1, 1), (70, 328), (64, 512)]
    weights = [normal(*shape, device, seed=i) for i, shape in enumerate(shapes)]
    weights[0][64:128, 640:] = -0.0
    weights[2][5, ::7] = 0.0
    FastGroup(weights).check("fast_group")
    FastGroup([normal(64, cols, device, seed=cols) for cols in (512, 1024)]).check(
        "fast_group of whole blocks"
    )


def packed_experts(device: torch.device) -> None:
    """Check chosen experts, which share tiles with others: marked from ids on the device, then decoded."""
    import torch
    from bench.kernels.timing import expect_same_bits

    from vllm_dfloat.device import experts, ops

    weight = normal(3 * ROWS, COLS, device, seed=2)
    packed = ops.pack(weight, "w13")
    out = torch.full((packed.size * 2048,), torch.nan, dtype=torch.bfloat16, device=device)
    status = torch.empty(packed.size, dtype=torch.int32, device=device)
    chosen = torch.empty(3, dtype=torch.int32, device=device)
    experts.mark_chosen(torch.tensor([[2, -1, 5], [2, 0, 2]], device=device), None, chosen)
    experts.decode_chosen(packed.desc, 3, ROWS, COLS, chosen, out, status)
    found = out[: weight.numel()].view(3, ROWS, COLS)
    for expert in (0, 2):
        expect_same_bits(found[expert], weight.view(3, ROWS, COLS)[expert], "decode_chosen")
    shared = set(status.tolist())
    if chosen.tolist() != [1, 0, 1] or shared != {0, experts.STATUS_SKIPPED}:
        raise RuntimeError(f"chosen {chosen.tolist()}, status words {sorted(shared)}")


def fast_experts(device: torch.device) -> None:
    """Check chosen experts in the fast layout, which share blocks of rows with others; with escapes and a raw tile."""
    import torch
    from bench.kernels.fast_decode import pack
    from bench.kernels.timing import expect_same_bits

    from vllm_dfloat.device import experts, fast_experts, fast_ops

    weight = normal(3 * 90, 650, device, seed=5)
    weight[192:256, 128:256] = -0.0
    weight[200, ::7] = 0.0
    for shape in ((3, 90, 650), (3, 64, 512)):
        num_experts, rows, cols = shape
        part = weight[: num_experts * rows, :cols].contiguous()
        fast = pack(part)
        out = torch.full((part.numel(),), torch.nan, dtype=torch.bfloat16, device=device)
        tiles = fast_ops.num_tiles(num_experts * rows, cols)
        status = torch.full((tiles,), -1, dtype=torch.int32, device=device)
        chosen = torch.empty(num_experts, dtype=torch.int32, device=device)
        experts.mark_chosen(torch.tensor([[2, -1, 5], [2, 2, 2]], device=device), None, chosen)
        fast_experts.launch_decode_chosen(fast.desc, *shape, chosen, out, status)
        expect_same_bits(out.view(shape)[2], part.view(shape)[2], f"fast_chosen of {shape}")
        if not out.view(shape)[0].isnan().all() or set(status.tolist()) != {0, -1}:
            raise RuntimeError(f"fast_chosen of {shape}: experts without tokens were written")


def encoder(device: torch.device) -> None:
    from bench.kernels.decode import check_decode, device_encoded

    from vllm_dfloat.device import ops

    weight = normal(ROWS, COLS, device, seed=1)
    check_decode(device_encoded(weight), weight, "encode", ops.decode)


def official_unit(device: torch.device) -> None:
    import torch
    from bench.kernels.timing import expect_same_bits

    from vllm_dfloat.device import unit_decode
    from vllm_dfloat.dfloat11.encode import as_unit, encode_unit

    weight = normal(12, COLS, device, seed=2)
    unit = as_unit(encode_unit([weight.cpu().view(torch.uint16).numpy().reshape(-1)], "w"), "w")
    expect_same_bits(unit_decode.decode_unit(unit, device), weight, "decode_dfloat11")


def official_encoder(device: torch.device) -> None:
    """Check the encoder as `compress` uses it: two members, and pieces with a partly filled last lane."""
    import torch
    from bench.kernels.timing import WrongBitsError

    from vllm_dfloat.device.unit_coder import DeviceCoder
    from vllm_dfloat.dfloat11.encode import encode_unit

    members = [normal(rows, COLS, device, seed=rows).cpu() for rows in (12, 1)]
    bits = [member.view(torch.uint16).numpy() for member in members]
    made, expected = encode_unit(bits, "w", DeviceCoder(device)), encode_unit(bits, "w")
    wrong = [field for field in expected if (made[field] != expected[field]).any()]
    if wrong:
        raise WrongBitsError(f"encode_dfloat11: {', '.join(wrong)}")


def official_held(device: torch.device) -> None:
    from bench.kernels.decode import check_decode, check_rows

    from vllm_dfloat.device import unit_resident as units

    weight = normal(12, COLS, device, seed=2)
    held = units.pack(weight, "w")
    check_decode(held, weight, "decode_resident", units.decode)
    check_rows(held, weight, some_rows(weight), "decode_resident_rows", units.decode_rows)


def fast_held(device: torch.device) -> None:
    """Check the fast layout with escapes, a raw tile, and rows that end within a group of 16; and runs of its rows."""
    from bench.kernels.fast_decode import check_decode, check_rows, check_run, pack

    weight = normal(200, 650, device, seed=3)
    weight[64:128, 640:] = -0.0
    weight[5, ::7] = 0.0
    fast = pack(weight)
    check_decode(fast, weight, "fast_decode")
    for first, count in ((0, 64), (64, 128), (128, 72)):
        check_run(fast, weight, first, count, f"fast_decode_run of {count} rows")
    whole = normal(192, 512, device, seed=4)
    check_run(pack(whole), whole, 64, 128, "fast_decode_run of whole tiles")
    check_rows(fast, weight, some_rows(weight), "fast_rows")


def fused_product(device: torch.device, cols: int, num_x: int) -> None:
    from bench.kernels.fused import check_fused

    from vllm_dfloat.device import ops

    weight, x = normal(5, cols, device, seed=cols), normal(num_x, cols, device, seed=num_x)
    check_fused(ops.pack(weight, "w"), weight, x, f"fused, {num_x} rows, {cols} columns")


def fused_products(device: torch.device) -> dict[str, Callable[[], None]]:
    """Return a check per fused kernel: for each compiled number of rows and each number of segments."""
    from vllm_dfloat.codec import layout
    from vllm_dfloat.device import fused
    from vllm_dfloat.kernels import packed_matmul as kernels

    eighth = layout.TILE_WEIGHTS // 8
    supported = [n * eighth for n in range(1, 17) if kernels.is_supported(n * eighth)]
    columns = {kernels.num_segments(cols): cols for cols in reversed(supported)}
    num_rows = fused.compiled_for(kernels.MAX_ROWS)
    if device.type == "cpu":  # seconds each in the interpreter
        columns, num_rows = {1: columns[1]}, [1]
    return {
        f"fused, {num_x} rows, {segments} segments": partial(fused_product, device, cols, num_x)
        for num_x in reversed(num_rows)
        for segments, cols in sorted(columns.items(), reverse=True)
    }


def checks(device: torch.device) -> dict[str, Callable[[], None]]:
    """Return every check by name; those that compile longest come first."""
    parts = (
        packed_group, packed_decode, packed_experts, packed_rows, encoder, official_unit, official_encoder,
        official_held, fast_held, fast_experts, fast_group,
    )  # fmt: skip
    return fused_products(device) | {part.__name__: partial(part, device) for part in parts}


def share(text: str) -> tuple[int, int]:
    index, _, number = text.partition("/")
    if not (index.isdigit() and number.isdigit() and int(index) < int(number)):
        raise argparse.ArgumentTypeError(
            f"{text}; expected such as 0/4, the first below the second"
        )
    return int(index), int(number)


def is_right(name: str, check: Callable[[], None]) -> bool:
    """Run a check and print its line, with the error if there is one; return whether it passed."""
    begun = time.monotonic()
    try:
        check()
    except Exception as error:  # wrong bits, or any exception of Triton and the driver
        traceback.print_exc()
        reason = next(iter(str(error).splitlines()), "")
        print(f"WRONG: {name}: {type(error).__name__}: {reason[:200]}", flush=True)
        return False
    print(f"right bits: {name} ({time.monotonic() - begun:.1f} s)", flush=True)
    return True


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="checks to run, by default all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--share", type=share, default=(0, 1), help="I/N: every N-th from the I-th")
    args = parser.parse_args(argv)
    try:
        device = prepare(args.device)
    except CannotRunError as error:
        print(f"sanitize_kernels: cannot run: {error}", file=sys.stderr)
        return 2
    found = checks(device)
    unknown = [name for name in args.names if name not in found]
    if unknown:
        parser.error(f"no check {', '.join(unknown)}; there are {', '.join(found)}")
    first, step = args.share
    names = (args.names or list(found))[first::step]
    verdicts = [is_right(name, found[name]) for name in names]
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
