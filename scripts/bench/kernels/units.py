"""Measure the official layout, decoded by our kernels and by its own, next to the packed layout and nvCOMP."""

from __future__ import annotations

from typing import Any

import torch
from bench.kernels.decode import buffers, check_decode
from bench.kernels.peers import NVCOMP_ALGORITHMS, NotHereError, Nvcomp, OfficialKernel
from bench.kernels.timing import Bench, Call, expect_no_status, expect_same_bits
from bench_setup import copy_of, normal, poisoned

from vllm_dfloat.device import ops, unit_decode, unit_resident
from vllm_dfloat.dfloat11.encode import as_unit, encode_unit

SIZES = [(4096, 4096), (28_672, 4096)]
Facts = dict[str, dict[str, Any]]


def run(bench: Bench) -> None:
    for rows, cols in bench.pick(SIZES, [(8, 700)]):
        if bench.begin("layouts", f"{rows} x {cols}"):
            _measure(bench, rows, cols)


def _measure(bench: Bench, rows: int, cols: int) -> None:
    case, weight = f"{rows} x {cols}", normal(rows, cols, bench.device)
    packed = ops.pack(weight, "w")
    num_sets = bench.num_sets(packed.num_bytes + 2 * weight.numel())
    outs = [buffers(packed) for _ in range(num_sets)]
    calls, facts = {}, {}
    layouts = {"packed": (packed, ops.decode)}
    layouts["official, held"] = (unit_resident.pack(weight, "w"), unit_resident.decode)
    for name, (held, decode) in layouts.items():
        bench.compare(check_decode, held, weight, f"{name} {case}", decode)
        calls[name] = _held_call(held, decode, outs)
        facts[name] = {"bits_per_weight": _bits(held.num_bytes, weight)}
    tensors = encode_unit([weight.cpu().view(torch.uint16).numpy().reshape(-1)], "w")
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    calls["official, as in a file"] = _unit_call(bench, weight, tensors, outs)
    facts["official, as in a file"] = {"bits_per_weight": _bits(num_bytes, weight)}
    _add_official_kernel(bench, case, weight, tensors, outs, calls, facts)
    for algorithm in NVCOMP_ALGORITHMS:
        _add_nvcomp(bench, case, weight, algorithm, outs, calls, facts)
    bench.measure("layouts", case, calls, num_sets, 2 * weight.numel(), facts)


def _bits(num_bytes: int, weight: torch.Tensor) -> float:
    return round(8 * num_bytes / weight.numel(), 3)


def _held_call(held: Any, decode: Any, outs: list[Any]) -> Call:
    copies = [held] + [copy_of(held) for _ in outs[1:]]
    return lambda i: decode(copies[i].desc, held.rows, held.cols, *outs[i])


def _unit_call(
    bench: Bench, weight: torch.Tensor, tensors: dict[str, Any], outs: list[Any]
) -> Call:
    """Return a call that decodes a unit from the tensors of a file, checked."""
    unit = as_unit(tensors, "w")
    fields = (unit.stream, unit.sign_mantissa, unit.tables, unit.positions, unit.gaps)
    sets = [[torch.from_numpy(field).to(weight.device) for field in fields] for _ in outs]
    status = torch.full((unit.num_blocks,), -1, dtype=torch.int32, device=weight.device)
    numel = weight.numel()

    def call(i: int) -> None:
        unit_decode.decode_dfloat11(*sets[i], outs[i][0][:numel], status)

    for i in range(len(outs)):
        bench.compare(_check, call, i, weight, outs, "official unit")
        bench.compare(expect_no_status, status, "official unit")
    return call


def _check(call: Call, i: int, weight: torch.Tensor, outs: list[Any], what: str) -> None:
    out = outs[i][0]
    out.copy_(poisoned(out.numel(), out.device))
    call(i)
    expect_same_bits(out[: weight.numel()], weight, what)


def _add_official_kernel(
    bench: Bench, case: str, weight: torch.Tensor, tensors: dict[str, Any], outs: list[Any],
    calls: dict[str, Call], facts: Facts,
) -> None:  # fmt: skip
    name = "dfloat11's own kernel"
    try:
        kernel = OfficialKernel(bench.device)
    except NotHereError as error:
        bench.skip("layouts", case, name, str(error))
        return
    launches = [kernel.prepare(tensors, bench.device) for _ in outs]
    _add_peer(bench, case, name, lambda i: launches[i](outs[i][0]), weight, outs, calls)
    facts[name] = dict(facts["official, as in a file"])


def _add_nvcomp(
    bench: Bench, case: str, weight: torch.Tensor, algorithm: str, outs: list[Any],
    calls: dict[str, Call], facts: Facts,
) -> None:  # fmt: skip
    name = f"nvCOMP {algorithm}"
    try:
        codec = Nvcomp(algorithm, bench.device)
    except NotHereError as error:
        bench.skip("layouts", case, name, str(error))
        return
    try:
        encoded = codec.encode(weight)
        targets = [out[: weight.numel()] for out, _ in outs]
        decoders = [codec.decoder(encoded.clone(), target) for target in targets]
    except Exception as error:  # any error of another package: the others must still be measured
        bench.skip("layouts", case, name, f"{type(error).__name__}: {error}")
        return
    _add_peer(bench, case, name, lambda i: decoders[i](), weight, outs, calls)
    facts[name] = {"bits_per_weight": _bits(encoded.numel(), weight)}


def _add_peer(
    bench: Bench, case: str, name: str, call: Call, weight: torch.Tensor, outs: list[Any],
    calls: dict[str, Call],
) -> None:  # fmt: skip
    """Add a peer if its bits are right. If not, only say so: no kernel of this project has failed."""
    try:
        for i in range(len(outs)):
            _check(call, i, weight, outs, name)
    except Exception as error:  # as above
        bench.skip("layouts", case, name, f"{type(error).__name__}: {error}")
        return
    calls[name] = call
