"""Try launch parameters on the GPU at hand, bits compared first, and print an entry for CONFIGS in kernels/configs.py.

    python scripts/tune_kernels.py [--seconds 300] [--only FIELD ...]
    python scripts/tune_kernels.py --device cpu    # a rehearsal in Triton's interpreter; its choice means nothing

Parameters are tried one after the other, each with the best values of those before it; later ones have the values of
configs.py. A candidate replaces the current value only if it is more than 2 % faster, on average over what the
parameter is used for. Exit status 0; 1 wrong bits, and
then no choice is printed; 2 it cannot run here.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from bench_setup import CannotRunError, environment, prepare

if TYPE_CHECKING:
    from bench.kernels.timing import Bench, Call
    from bench.kernels.tune_cases import Case

WORTH = 0.98  # a candidate must take less than this part of the current value's time
CANDIDATES: dict[str, tuple[int, ...]] = {  # Triton takes powers of two
    "decode_tiles_per_program": (1, 2, 4, 8, 16),
    "fast_rows_per_program": (8, 16, 32, 64),
    "fast_rows_at_once": (2, 4, 8, 16),
    "fast_tiles_per_program": (1, 2, 4, 8),
    "fast_weights_at_once": (8, 16),
    "fast_num_warps": (2, 4, 8),
    "chosen_programs": (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536),
    "dfloat11_num_warps": (2, 4, 8, 16),
    "fused_gemv_tiles_per_program": (1, 2, 4, 8),
}
DERIVED = ("fused_max_rows", "group_decode_max_numel")
WITH_FUSED_MAX_ROWS = ("fused_max_rows_if_large", "fused_large_rows")  # found with it
NOT_TUNED = (  # of LM heads; of the encoders, which see a weight once
    "slab_bytes",
    "slab_proof_work",
    "count_window_tiles_per_program",
    "count_tiles_per_program",
    "count_num_warps",
    "encode_tiles_per_program",
    "dfloat11_encode_tiles_per_program",
    "dfloat11_encode_num_warps",
    "dfloat11_split_weights",
    "fast_encode_rows",
    "fast_product",  # see choose_products.py
    "fast_tokens_per_expert",  # as --only experts_fused shows
)


def best_of(bench: Bench, field: str, cases: Sequence[Case], config: Any) -> Any:
    """Return `config` with the value of a field that is best on average over the cases.

    Raises:
        WrongBitsError: a kernel gave wrong results with a candidate.
    """
    present = getattr(config, field)
    variants = {}
    for value in [present, *(value for value in CANDIDATES[field] if value != present)]:
        variant = replace(config, **{field: value})
        if variant.fast_rows_per_program % variant.fast_rows_at_once:
            continue
        reason = why_not(cases, variant)
        if reason is None:
            variants[str(value)] = variant
        else:
            bench.skip(field, cases[0].name, str(value), reason)
    ratios: dict[str, list[float]] = {name: [] for name in variants}
    for case in cases:
        calls = {name: call_with(variant, case) for name, variant in variants.items()}
        first = len(bench.rows)
        bench.measure(field, case.name, calls, case.num_sets)
        for row in bench.rows[first:]:
            ratios[row["name"]].append(row["ratio"])
    fastest = min(ratios, key=lambda name: sum(ratios[name]))
    is_better = str(present) not in variants or sum(ratios[fastest]) < WORTH * len(cases)
    return variants[fastest] if is_better else config


def why_not(cases: Sequence[Case], config: Any) -> str | None:
    """Return why kernels cannot be launched with these parameters, or None; raise WrongBitsError for wrong bits."""
    from vllm_dfloat.kernels import configs

    for case in cases:
        try:
            with configs.override(config):
                case.check()
        except case.cannot_launch as error:
            return f"{type(error).__name__}: {error}"
    return None


def call_with(config: Any, case: Case) -> Call:
    from vllm_dfloat.kernels import configs

    def call(i: int) -> None:
        with configs.override(config):
            case.call(i)

    return call


def tune(bench: Bench, names: Sequence[str]) -> Any:
    """Return the best parameters found for the bench's device."""
    from bench.kernels import tune_cases

    from vllm_dfloat.kernels import configs

    config = configs.config_of(bench.device)
    for field in CANDIDATES:
        if field in names and bench.begin(field, "all"):
            config = best_of(bench, field, tune_cases.cases_for(bench, field), config)
    with configs.override(config):
        if "fused_max_rows" in names and bench.begin("fused_max_rows", "all"):
            config = replace(config, **tune_cases.fused_max_rows(bench))
        if "group_decode_max_numel" in names and bench.begin("group_decode_max_numel", "all"):
            config = replace(config, group_decode_max_numel=tune_cases.group_max_numel(bench))
    return replace(config, measured=True)


def entry(config: Any, environment: dict[str, Any]) -> str:
    """Return a line of CONFIGS with the device's name as its key."""
    from vllm_dfloat.kernels.configs import DEFAULT

    changed = [
        f"{field.name}={getattr(config, field.name)!r}"
        for field in fields(config)
        if getattr(config, field.name) != getattr(DEFAULT, field.name)
    ]
    name = environment["device"]
    return (
        f"    # {environment['date'][:10]}, driver {environment['driver']}, torch {environment['torch']}, "
        f"triton {environment['triton']}\n    {name!r}: LaunchConfig({', '.join(changed)}),"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=300, help="begin no field after so long")
    names = [*CANDIDATES, *DERIVED]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    args = parser.parse_args(argv)
    begun = time.monotonic()
    try:
        device = prepare(args.device)
    except CannotRunError as error:
        print(f"tune_kernels: cannot run: {error}", file=sys.stderr)
        return 2
    import bench_report
    from bench.kernels.timing import Bench, WrongBitsError

    print(bench_report.HEAD, flush=True)
    report = lambda row: print(bench_report.line(row), flush=True)  # noqa: E731
    bench = Bench(device, 21 if device.type == "cuda" else 1, begun + args.seconds, report)
    try:
        config = tune(bench, args.only)
    except WrongBitsError as error:
        print(f"tune_kernels: wrong bits: {error}; no choice is printed", file=sys.stderr)
        return 1
    print(entry(config, environment(device)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
