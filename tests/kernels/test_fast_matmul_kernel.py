"""The product with the fast layout, in Triton's interpreter: within its error bound, each row for itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from guard_pages import run_python
from helpers import assert_within_bound, bf16_bits, gaussian, same_bits, to_torch

from vllm_dfloat.codec import fast_layout
from vllm_dfloat.codec.fast_layout import FastTensor
from vllm_dfloat.device import fast_fused, fast_ops
from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.kernels import fast_matmul as kernels
from vllm_dfloat.kernels.configs import INTERPRETED
from vllm_dfloat.kernels.fast_product import (
    LOW_BANDS,
    TALL_BANDS,
    DotShape,
    GemvShape,
)

Shape = DotShape | GemvShape
MOST = INTERPRETED.fast_product.max_rows(64)  # rows of activations that are multiplied
# For each form: columns at a time that do not divide a matrix's, programs of several rows of tiles, and parts.
SHAPES: list[tuple[Shape, int]] = [
    (GemvShape(turns=8), 1),
    (GemvShape(turns=4, warps=8, parts=2), 2),
    (GemvShape(turns=8, groups=64, parts=3), 3),
    (GemvShape(turns=16), 4),
    (DotShape(), 1),
    (DotShape(parts=3), 16),
    (DotShape(rows=128, warps=8), 33),
    (DotShape(rows=128, cols=256, parts=2), 5),
    (DotShape(cols=256), 64),
    (DotShape(rows=32, warps=2, width=4), 7),
    (DotShape(rows=32, warps=1, width=4, parts=2), 9),
    (DotShape(rows=16, stages=1, warps=1, width=4), 5),
    (DotShape(rows=16, stages=1, warps=1, width=4, parts=2), 9),
    (DotShape(rows=16, stages=1, warps=1, width=4, in_order=True), 20),
    (DotShape(rows=8, stages=1, warps=1, width=4, in_order=True), 3),
    (DotShape(rows=16, cols=256, stages=1, warps=2, width=4, in_order=True), 9),
    (LOW_BANDS, 13),
    (replace(LOW_BANDS, rows=128, warps=8, parts=2), 6),
    (TALL_BANDS, 33),
    (replace(TALL_BANDS, parts=3), 70),  # two programs for the same rows of the matrix
    (TALL_BANDS, 130),
]
AHEAD = DotShape(rows=16, stages=1, warps=1, width=4)
SHARES = [SHAPES[i] for i in (2, 3, 7, 10, 12, 17, 19)]


def activations(num_rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, cols, generator=torch.Generator().manual_seed(seed)).bfloat16()


def held(weight: torch.Tensor) -> fast_ops.FastWeight:
    fast = fast_ops.pack(weight, "w")
    assert fast is not None
    return fast


def starts_of(fast: fast_ops.FastWeight) -> np.ndarray:
    _, num_entries, base = fast.fields
    lay = fast_layout.FastLayout(fast.rows, fast.cols, base, num_entries)
    return FastTensor(lay, fast.payload.numpy()).starts


def multiply(
    matrix: fast_ops.FastWeight, x: torch.Tensor, shape: Shape, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the kernels' result, computed in poisoned memory."""
    out = torch.full((len(x), matrix.rows), float("nan"), dtype=torch.bfloat16)
    partials = torch.full((kernels.num_partials(matrix.rows, len(x), shape),), float("nan"))
    kernels.matmul(x, matrix.desc, matrix.cols, bias, out, partials, shape)
    return out


def hard(rows: int, cols: int) -> torch.Tensor:
    """Return a matrix with a raw tile, rows of zeros, and escapes at the edges of tiles and of the matrix."""
    weight = to_torch(gaussian(rows, cols))
    for row, col in (
        (0, 0),
        (0, 127),
        (1, 128),
        (rows - 1, cols - 1),
        (rows - 1, 0),
        (7, 200),
        (7, 201),
    ):
        weight[row, col] = 1e-30
    weight[2, 130:138] = 1e20
    weight[5, 256:320] = 0
    spread = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) * 9
    weight[:64, 384:512] = (weight[:64, 384:512].float() * spread.exp()).bfloat16()
    return weight


@pytest.mark.parametrize(("shape", "num_rows"), SHAPES)
def test_product_is_within_the_derived_bound(shape: Shape, num_rows: int) -> None:
    weight = hard(131, 768)
    matrix, x = held(weight), activations(num_rows, 768)
    assert (np.diff(starts_of(matrix)) == fast_layout.RAW_ENTRIES).sum() == 1
    bias = activations(1, len(weight), seed=3)[0] if num_rows % 2 else None
    assert_within_bound(multiply(matrix, x, shape, bias), weight, x, bias)


@pytest.mark.parametrize(("shape", "num_rows"), SHARES)
def test_result_of_a_row_does_not_depend_on_the_other_rows(shape: Shape, num_rows: int) -> None:
    # Bug caught: 0 times infinity, where rows or columns that do not count are multiplied by 0.
    matrix, x = held(to_torch(gaussian(67, 512))), activations(num_rows, 512)
    alone = multiply(matrix, x, shape)
    for other in (activations(num_rows, 512, seed=1), torch.full_like(x, float("inf"))):
        other[1] = x[1]
        assert same_bits(multiply(matrix, other, shape)[1], alone[1])
    again = torch.cat([x[1:], x[:1]])
    assert same_bits(multiply(matrix, again, shape)[0], alone[1])  # nor on the row's index


@pytest.mark.parametrize(
    "shape", [GemvShape(turns=16), GemvShape(turns=8, groups=64), DotShape(), AHEAD, LOW_BANDS]
)
def test_infinite_weights_and_no_numbers_stay_in_their_rows(shape: Shape) -> None:
    # Bug caught: columns past the end of a row, multiplied by 0.
    weight = to_torch(gaussian(66, 640))
    weight[2, 639], weight[3, 0], weight[65, 5] = float("inf"), float("-inf"), float("nan")
    x = activations(1, 640)
    out = multiply(held(weight), x, shape)
    finite = [row for row in range(66) if row not in (2, 3, 65)]
    assert_within_bound(out[:, finite], weight[finite], x)
    assert torch.equal(out[:, 2], x[:, 639].float().sign().bfloat16() * float("inf"))
    assert torch.equal(out[:, 3], x[:, 0].float().sign().bfloat16() * float("-inf"))
    assert out[:, 65].isnan().all()


@pytest.mark.parametrize("shape", [GemvShape(turns=16), DotShape()])
def test_rows_of_zeros_give_zeros(shape: Shape) -> None:
    weight = to_torch(gaussian(70, 128))
    weight[3], weight[69] = 0, -0.0
    out = multiply(held(weight), activations(2, 128), shape)
    assert not out[:, [3, 69]].any()


@pytest.mark.parametrize(
    "shape", [GemvShape(turns=16), DotShape(), DotShape(parts=2), AHEAD, LOW_BANDS]
)
def test_result_is_rounded_to_nearest_with_ties_to_even(shape: Shape) -> None:
    # One weight of 1 and a bias: sums that lie halfway between two BF16 numbers.
    weight = to_torch(bf16_bits(torch.ones(4, 256).numpy()))
    x = torch.zeros(2, 256, dtype=torch.bfloat16)
    x[:, 0] = 2.0**-8
    bias = torch.tensor([1.0, 1.0078125, -1.0, 256.0]).bfloat16()
    expected = (bias.float() + 2.0**-8).bfloat16().expand(2, 4)
    assert same_bits(multiply(held(weight), x, shape, bias), expected.contiguous())


def test_columns_that_a_launch_would_leave_out_are_refused() -> None:
    # Bug caught: the last columns were not multiplied, and nothing said so.
    with pytest.raises(ValueError, match="384 columns, taken 256 at a time"):
        multiply(held(to_torch(gaussian(64, 384))), activations(1, 384), DotShape(cols=256))


def test_rows_of_activations_that_a_kernel_does_not_take_are_refused() -> None:
    # Bug caught: the first 64 or 128 rows multiplied, and the others left as they were.
    matrix = held(to_torch(gaussian(64, 128)))
    for shape, most in ((GemvShape(), 4), (DotShape(), 64), (LOW_BANDS, 16), (TALL_BANDS, 256)):
        assert kernels.max_rows(shape) == most
        with pytest.raises(ValueError, match=f"{most + 1} rows of activations; .* takes {most}$"):
            multiply(matrix, activations(most + 1, 128), shape)


def test_rows_that_no_warp_would_have_are_refused() -> None:
    # Bug caught: half of the rows were not written, and nothing said so.
    shape = replace(LOW_BANDS, rows=48, warps=2)
    with pytest.raises(ValueError, match="48 rows for 2 warps; expected 16 or 32 for each"):
        multiply(held(to_torch(gaussian(64, 128))), activations(1, 128), shape)


_GUARDED = """
import os
import bench_setup, numpy as np, torch
from guard_pages import guarded
from helpers import gaussian, to_torch
from vllm_dfloat.codec.fast_encode import encode
from vllm_dfloat.codec.fast_layout import size
from vllm_dfloat.device.packed_weight import make_descriptor
from vllm_dfloat.kernels import fast_matmul as kernels
from vllm_dfloat.kernels.fast_product import DotShape, GemvShape

bench_setup.let_interpreter_count()
weight = to_torch(gaussian(130, 768))
weight[0, :3] = weight[129, 767] = 1e-30
spread = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) * 9
weight[:64, 640:] = spread.exp().bfloat16()
fast = encode(weight.view(torch.uint16).numpy())
lay = fast.layout
shape, num_x = {
    "gemv": (GemvShape(turns=16), 3),
    "dot": (DotShape(rows=128, parts=2), 6),
    "ahead": (DotShape(rows=16, stages=1, warps=1, width=4), 6),
    "low bands": (DotShape(rows=128, stages=1, warps=8, width=4, parts=2), 6),
    "tall bands": (DotShape(rows=64, stages=1, warps=2, width=4, parts=2), 66),
    "in order": (DotShape(rows=8, cols=256, stages=1, warps=2, width=4, in_order=True), 6),
}[os.environ["KERNEL"]]
rng = np.random.default_rng(0)
for kind in range(4):  # sound; starts a little off; any starts; any starts and entries
    held = fast.payload.copy()
    starts = held[lay.starts_offset : lay.entries_offset].view(np.uint32)
    entries = held[lay.entries_offset :].view(np.uint32)
    if kind == 1:
        starts += rng.integers(0, 9, starts.size, np.uint32)
    if kind > 1:
        starts[:] = rng.integers(0, 1 << 32, starts.size, np.uint32)
        starts[3:5] = 0, 4096
    if kind > 2:
        entries[:] = rng.integers(0, 1 << 32, entries.size, np.uint32)
    memory = guarded(held)
    desc = make_descriptor(memory, (2, lay.num_entries, lay.base), size(130, 768))
    x = guarded(np.full((num_x, 768), 0x3F80, np.uint16)).view(torch.bfloat16)
    bias = guarded(np.full(130, 0x3F80, np.uint16)).view(torch.bfloat16)
    partials = guarded(np.full(max(1, kernels.num_partials(130, num_x, shape)), np.nan, np.float32))
    out = guarded(np.full((num_x, 130), 0x7FC1, np.uint16)).view(torch.bfloat16)
    kernels.matmul(x, desc, 768, bias, out, partials, shape)
    assert kind or out.isfinite().all()
print("done")
"""


# They share the code that looks at entries; where to load ahead from depends on the starts too.
@pytest.mark.parametrize(
    "kernel",
    [
        "dot",
        "ahead",
        "in order",
        "low bands",
        "tall bands",
        pytest.param("gemv", marks=pytest.mark.on_demand),
    ],
)
def test_no_access_leaves_the_tensors_whatever_the_bytes_say(kernel: str) -> None:
    done = run_python(_GUARDED, {"TRITON_INTERPRET": "1", "KERNEL": kernel})
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr}"
    assert done.stdout == "done\n"


@pytest.mark.parametrize(
    ("shape", "num_rows"),
    [
        (GemvShape(parts=2), 4),
        (DotShape(parts=8), 5),
        (DotShape(parts=8), 64),
        (replace(TALL_BANDS, parts=8), 129),
    ],
)
def test_more_parts_than_columns_at_a_time_still_add_up(shape: Shape, num_rows: int) -> None:
    # Bug caught: parts without columns, whose sums are not written.
    weight, x = to_torch(gaussian(5, 256)), activations(num_rows, 256)
    assert_within_bound(multiply(held(weight), x, shape), weight, x)


@pytest.mark.parametrize("num_rows", [1, 3, 17, min(130, MOST)])
def test_bridge_multiplies_within_the_scratch_of_a_layer(num_rows: int) -> None:
    # Rows of NaN in the scratch: sums that are not written would show.
    weight, x = hard(131, 768), activations(num_rows, 768)
    fast = held(weight)
    memory = torch.full((fast_ops.scratch_numel(131, 768),), float("nan"), dtype=torch.bfloat16)
    bias = activations(1, 131, seed=3)[0]
    status = torch.zeros(0, dtype=torch.int32)
    out = fast_fused.matmul(x, fast.desc, 131, 768, bias, (memory, status))
    assert_within_bound(out, weight, x, bias)
    misaligned = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
    assert same_bits(fast_fused.matmul(misaligned, fast.desc, 131, 768, bias), out)


@pytest.mark.parametrize("num_rows", [1, 16])
@pytest.mark.parametrize("word", range(4))
def test_changed_descriptor_is_not_followed_and_gives_nan(num_rows: int, word: int) -> None:
    # Bug caught: an address that a flipped bit leads anywhere.
    fast = held(to_torch(gaussian(70, 256)))
    fast.desc[word] ^= 1 << 40
    assert fast_fused.matmul(activations(num_rows, 256), fast.desc, 70, 256).isnan().all()
    fast.desc[word] ^= 1 << 40
    assert fast_fused.matmul(activations(num_rows, 256), fast.desc, 70, 256).isfinite().all()


def test_every_number_of_rows_has_its_kernel_among_those_compiled_at_start() -> None:
    device, rows, cols = torch.device("cpu"), 200, 768
    assert fast_fused.max_rows(device, rows, cols) == 0  # numba decodes here
    compiled = fast_fused.variants(device, rows, cols, MOST)
    for num_x in range(1, MOST + 1):
        shape = INTERPRETED.fast_product.launch_shape(rows, cols, num_x)
        assert (shape, kernels.compiled_rows(num_x, shape)) in compiled


def test_bridge_refuses_what_the_kernels_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = held(to_torch(gaussian(64, 256)))
    for x, columns, message in (
        (activations(MOST + 1, 256), 256, f"multiply 1 to {MOST} rows"),
        (activations(1, 256).float(), 256, "torch.float32"),
        (activations(1, 192), 192, r"weight \[64, 192\]; .* multiples of 128 columns"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            fast_fused.matmul(x, fast.desc, 64, columns)
    monkeypatch.setenv("VLLM_DFLOAT_BACKEND", "triton")
    device = torch.device("cpu")
    assert fast_fused.max_rows(device, 64, 256) == MOST
    assert fast_fused.max_rows_in_order(device, 64, 256) == 32
    assert (
        fast_fused.max_rows(device, 64, 192) == fast_fused.max_rows_in_order(device, 64, 192) == 0
    )


def test_columns_that_are_no_whole_tiles_are_not_supported() -> None:
    assert kernels.is_supported(4096)
    assert kernels.is_supported(14_336)
    assert not kernels.is_supported(0)
    assert not kernels.is_supported(4096 + 64)
    assert not kernels.is_supported(kernels.MAX_COLS)


def test_no_weights_give_an_empty_result() -> None:
    nothing = torch.zeros(0, dtype=torch.bfloat16)
    desc = torch.zeros(4, dtype=torch.int64)
    kernels.matmul(activations(2, 256), desc, 256, None, nothing.view(2, 0), nothing, DotShape())
