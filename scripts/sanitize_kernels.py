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

from bench_setup import CannotRunError, prepare

if TYPE_CHECKING:
    import torch


def checks(device: torch.device) -> dict[str, Callable[[], None]]:
    """Return every check by name: first those of kernels that no GPU has run yet, then those that compile longest."""
    from bench.checks import fast, official, packed

    new = (
        fast.fast_experts_product, fast.fast_in_order, fast.fast_group, fast.fast_encoder, fast.fast_chosen,
        fast.fast_run, official.official_run, official.official_held, packed.packed_run,
    )  # fmt: skip
    known = (
        packed.packed_group, packed.packed_decode, packed.packed_experts, packed.packed_rows, packed.encoder,
        official.official_unit, official.official_encoder, fast.fast_held,
    )  # fmt: skip
    return {
        **{part.__name__: partial(part, device) for part in new},
        **packed.fused_products(device),
        **{part.__name__: partial(part, device) for part in known},
    }


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
