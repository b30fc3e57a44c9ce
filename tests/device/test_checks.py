"""Refused in one sentence: unusable devices, a missing Triton, and tensors that a kernel must not get."""

from collections.abc import Callable

import pytest
import torch
from guard_pages import run_python
from helpers import gaussian, same_bits, to_torch

from vllm_dfloat.device import checks, fused, groups, ops
from vllm_dfloat.device import unit_resident as units
from vllm_dfloat.errors import DeviceError, UnsupportedError
from vllm_dfloat.kernels import tiles  # noqa: F401  (now: a test below turns off the interpreter, for which it is made)

ROWS, COLS = 3, 2048
NUMEL, TILES = ROWS * COLS, 3
WEIGHT = to_torch(gaussian(ROWS, COLS))
PACKED, UNIT = ops.pack(WEIGHT, "w"), units.pack(WEIGHT, "w")
Buffers = tuple[torch.Tensor, torch.Tensor]


def by_decode(out: torch.Tensor, status: torch.Tensor) -> None:
    ops.decode(PACKED.desc, ROWS, COLS, out, status)


def by_group(out: torch.Tensor, status: torch.Tensor) -> None:
    groups.decode_group(groups.group_table([PACKED.desc], [(ROWS, COLS)]), TILES, out, status)


def by_fused(out: torch.Tensor, status: torch.Tensor) -> None:
    x = torch.ones(1, COLS, dtype=torch.bfloat16)
    fused.matmul(x, PACKED.desc, ROWS, COLS, None, (out, status))


def by_unit(out: torch.Tensor, status: torch.Tensor) -> None:
    units.decode(UNIT.desc, ROWS, COLS, out, status)


def good() -> Buffers:
    return torch.empty(NUMEL, dtype=torch.bfloat16), torch.empty(TILES, dtype=torch.int32)


def longer() -> torch.Tensor:
    return torch.empty(2 * NUMEL + 8, dtype=torch.bfloat16)


# Error that the message reports -> buffers with this error.
WRONG: dict[str, Callable[[], Buffers]] = {
    r"torch.float32 \[6144\] on cpu": lambda: (good()[0].float(), good()[1]),
    r"torch.bfloat16 \[6143\] on cpu": lambda: (good()[0][1:].clone(), good()[1]),
    r"torch.bfloat16 \[6144\] with strides \[2\] on cpu": lambda: (
        longer()[: 2 * NUMEL : 2],
        good()[1],
    ),
    r"torch.bfloat16 \[6144\] on cpu at 0x[0-9a-f]+": lambda: (
        longer()[1 : NUMEL + 1],
        good()[1],
    ),
    r"torch.bfloat16 \[3, 2048\] on cpu": lambda: (good()[0].view(ROWS, COLS), good()[1]),
    r"torch.bfloat16 \[6144\] on meta": lambda: (good()[0].to("meta"), good()[1]),
    r"torch.int64 \[3\] on cpu": lambda: (good()[0], good()[1].long()),
    r"torch.int32 \[2\] on cpu": lambda: (good()[0], good()[1][1:]),
}
DIRECT = [by_decode, by_group, by_fused, by_unit]


def sentence(found: str) -> str:
    """Return a pattern for the whole message, which is one line."""
    expected = r"expected torch\.\w+ \[at least \d+\] on cpu, contiguous(, aligned to 16 bytes)?"
    return rf"^\w+: [\w\[\]]+: {found}; {expected}\. Convert, move or allocate it so\.$"


@pytest.mark.parametrize("by", DIRECT)
@pytest.mark.parametrize("found", WRONG)
def test_wrong_buffers_are_refused_in_a_sentence(
    by: Callable[[torch.Tensor, torch.Tensor], None], found: str
) -> None:
    # Bug caught: a kernel writes past the end of a tensor, or into one of another dtype.
    with pytest.raises(UnsupportedError, match=sentence(found)):
        by(*WRONG[found]())


@pytest.mark.parametrize("by", [by_decode, by_group, by_unit])
def test_buffers_that_fit_are_taken(by: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
    out, status = good()
    by(out.fill_(float("nan")), status)
    assert same_bits(out.view(ROWS, COLS), WEIGHT)


def test_descriptors_and_tables_of_another_form_are_refused() -> None:
    desc, (out, status) = PACKED.desc, good()
    for wrong, found in ((desc.int(), r"torch.int32 \[4\]"), (desc[:3], r"torch.int64 \[3\]")):
        message = (
            rf": descriptor {found}; expected torch.int64 \[4\]\. Give that of a PackedWeight\."
        )
        with pytest.raises(UnsupportedError, match=f"decode{message}"):
            ops.decode(wrong, ROWS, COLS, out, status)
        with pytest.raises(UnsupportedError, match=f"decode_rows{message}"):
            ops.decode_rows(wrong, torch.tensor([0]), ROWS, COLS)
        with pytest.raises(UnsupportedError, match=f"decode_unit{message}"):
            units.decode(wrong, ROWS, COLS, out, status)
        with pytest.raises(
            UnsupportedError, match=r"decode_group: table torch.int\d+ \[\d\]; expected"
        ):
            groups.decode_group(wrong, TILES, out, status)


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        (torch.tensor([0.0]), r"torch.float32 \[1\] on cpu"),
        (torch.tensor([[0]]), r"torch.int64 \[1, 1\] on cpu"),
        (torch.tensor([0], device="meta"), r"torch.int64 \[1\] on meta"),
    ],
)
def test_ids_that_are_no_rows_are_refused(ids: torch.Tensor, found: str) -> None:
    message = rf": rows {found}; expected torch.int64 \[n\] on cpu\. Convert or move them\."
    with pytest.raises(UnsupportedError, match=f"decode_rows{message}"):
        ops.decode_rows(PACKED.desc, ids, ROWS, COLS)
    with pytest.raises(UnsupportedError, match=f"decode_unit_rows{message}"):
        units.decode_rows(UNIT.desc, ids, ROWS, COLS)
    for unpack, held in ((ops.unpack_rows, PACKED), (units.unpack_rows, UNIT)):
        with pytest.raises(UnsupportedError, match=f"w{message}"):
            unpack(held, ids)


@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_ids_of_32_bits_are_taken(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # vLLM's own ids are int32.
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", backend)
    ids = torch.tensor([2, 0], dtype=torch.int32)
    assert same_bits(ops.unpack_rows(PACKED, ids), WEIGHT[[2, 0]])


def test_activations_that_do_not_start_on_16_bytes_are_multiplied_all_the_same() -> None:
    memory = torch.randn(COLS + 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = memory[1 : COLS + 1].view(1, COLS)
    assert same_bits(fused.multiply(PACKED, x), fused.multiply(PACKED, x.clone()))


def test_a_bias_on_another_device_or_with_gaps_is_refused() -> None:
    x = torch.ones(1, COLS, dtype=torch.bfloat16)
    for bias, found in (
        (torch.ones(ROWS, device="meta"), "on meta"),
        (torch.ones(2 * ROWS)[::2], r"with strides \[2\]"),
    ):
        with pytest.raises(UnsupportedError, match=rf"bias torch.float32 \[3\] {found}; expected"):
            fused.multiply(PACKED, x, bias)


@pytest.mark.parametrize(
    ("capability", "message"),
    [
        ((7, 5), r"^Tesla T4: compute capability 7\.5; dfloat11 needs 8\.0 \(Ampere\) or newer$"),
        ((8, 0), None),
        ((12, 0), None),
    ],
)
def test_a_gpu_that_is_too_old_is_refused_by_its_name(
    capability: tuple[int, int], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Only the driver's answer is replaced; the rest is real.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    if message is None:
        checks.check_device(torch.device("cuda"))
        return
    with pytest.raises(DeviceError, match=message):
        checks.check_device(torch.device("cuda"))


def test_an_amd_gpu_is_taken_whatever_its_number_and_gets_no_instructions_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Bug caught: an MI100-like number, taken for an NVIDIA GPU older than Ampere; PTX for an AMD GPU.
    from vllm_dfloat.kernels import fast_decode

    monkeypatch.setattr(fast_decode, "is_compiled", lambda: True)
    assert fast_decode.has_prmt()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    checks.check_device(torch.device("cuda"))
    assert not fast_decode.has_prmt()


def test_other_devices_and_other_backends_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        DeviceError, match=r"^device mps: dfloat11 decodes on CPUs, NVIDIA and AMD GPUs"
    ):
        checks.check_device(torch.device("mps"))
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", "numba")
    with pytest.raises(DeviceError, match=r"^VLLM_DFLOAT_BACKEND=numba on cuda: .* Unset it"):
        checks.uses_triton(torch.device("cuda"))
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(
        DeviceError,
        match=r"^Triton on cpu: .* set TRITON_INTERPRET=1 .* or choose the CPU decoder \(VLLM_DFLOAT_BACKEND=numba",
    ):
        ops.unpack(PACKED)


_WITHOUT_TRITON = """
import os, sys
sys.modules["triton"] = None  # an import of it fails, as where it is not installed
import torch
from helpers import gaussian, same_bits, to_torch
from vllm_dfloat.device import checks, fused, groups, ops, unit_resident as units
from vllm_dfloat.errors import DeviceError

weight = to_torch(gaussian(3, 2048))
packed, unit = ops.pack(weight, "w"), units.pack(weight, "w")
ids, x = torch.tensor([0]), torch.ones(1, 2048, dtype=torch.bfloat16)
assert torch.equal(ops.unpack(packed).view(torch.int16), weight.view(torch.int16))  # a CPU needs none
torch.cuda.get_device_capability = lambda device: (9, 0)
os.environ["VLLM_DFLOAT_BACKEND"] = "triton"
lent = torch.empty(3 * 2048, dtype=torch.bfloat16), torch.empty(3, dtype=torch.int32)
for reader in (
    lambda: ops.unpack(packed),
    lambda: ops.unpack_rows(packed, ids),
    lambda: ops.decode(packed.desc, 3, 2048, *lent),
    lambda: ops.decode_rows(packed.desc, ids, 3, 2048),
    lambda: groups.unpack([packed]),
    lambda: fused.multiply(packed, x),
    lambda: fused.max_rows(x.device, 64, 2048),
    lambda: units.unpack(unit),
    lambda: units.unpack_rows(unit, ids),
    lambda: checks.check_device(torch.device("cuda")),
):
    try:
        reader()
    except DeviceError as error:
        print(error)
"""


def test_a_missing_triton_is_one_sentence_wherever_it_is_needed() -> None:
    # Bug caught: a traceback that ends in ModuleNotFoundError somewhere below a layer.
    done = run_python(_WITHOUT_TRITON, {})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 10
    assert set(lines) == {
        f"{device}: Triton cannot be imported (import of triton halted; None in sys.modules); dfloat11's GPU kernels "
        "need it. Install triton."
        for device in ("cpu", "cuda")
    }
