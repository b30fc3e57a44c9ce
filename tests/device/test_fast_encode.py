"""The encoder of the fast layout, in Triton's interpreter, against the oracle."""

from typing import Any

import numpy as np
import pytest
import torch
from fast_matrices import fast_matrices, trained_like
from guard_pages import run_python
from helpers import Bits, gaussian, to_torch

from vllm_dfloat.codec import fast_reference
from vllm_dfloat.codec.fast_layout import MAX_ESCAPES, RAW_ENTRIES, FastTensor
from vllm_dfloat.device import fast_encode
from vllm_dfloat.errors import DeviceError

MATRICES = fast_matrices()


def encoded(weight: Bits) -> FastTensor:
    found = fast_encode.encode(to_torch(weight))
    assert found is not None
    layout, payload = found
    return FastTensor(layout, payload.numpy())


@pytest.mark.parametrize("name", MATRICES)
def test_the_oracle_decodes_what_was_encoded(name: str) -> None:
    fast = encoded(MATRICES[name])
    assert fast.payload.shape == (fast.layout.num_bytes,)
    assert np.array_equal(fast_reference.decode(fast), MATRICES[name])


def test_a_tile_is_raw_from_513_escapes_on() -> None:
    fast = encoded(MATRICES["raw tiles"])
    counts = np.diff(fast.starts.astype(np.int64)).reshape(fast.layout.tile_rows, -1)
    assert counts[2, 2] == MAX_ESCAPES
    assert counts[3, 2] == counts[1, 0] == counts[9, 7] == RAW_ENTRIES


def test_gaussian_and_trained_like_weights_take_12_bits() -> None:
    assert encoded(gaussian(512, 1024)).bits_per_weight < 12.01
    assert encoded(trained_like(512, 1024)).bits_per_weight < 12.05


@pytest.mark.parametrize(
    "weight",
    [
        np.arange(1 << 16, dtype=np.uint16).reshape(256, 256),
        gaussian(1, 1),
        gaussian(2049, 1),
        np.zeros((0, 5), np.uint16),
        np.zeros((5, 0), np.uint16),
    ],
    ids=lambda weight: "{} x {}".format(*weight.shape),
)
def test_a_matrix_that_would_take_14_bits_per_weight_is_not_held(weight: Bits) -> None:
    assert fast_encode.encode(to_torch(weight)) is None


def test_a_transposed_matrix_is_encoded_by_its_rows() -> None:
    weight = gaussian(256, 130)
    found = fast_encode.encode(to_torch(weight.T).T)
    assert found is not None
    assert torch.equal(found[1], torch.from_numpy(encoded(weight).payload))


def test_a_matrix_that_is_not_aligned_is_copied_first() -> None:
    weight = to_torch(gaussian(1, 64 * 128 + 1)).view(-1)[1:].view(64, 128)
    found = fast_encode.encode(weight)
    assert found is not None
    expected = encoded(weight.clone().view(torch.uint16).numpy())
    assert torch.equal(found[1], torch.from_numpy(expected.payload))


def test_a_device_that_encodes_wrongly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_dfloat.kernels import fast_encode as kernels

    cpu, write = torch.device("cpu"), kernels.write
    fast_encode.check_encoder(cpu)
    # Of low bytes and nibbles the first word of the last row, of 144 weights; of starts and entries the last.
    for section, word in enumerate((-36, -18, -1, -1)):

        def spoilt(*given: Any, at: int = 2 + section, word: int = word) -> None:
            write(*given)
            given[at].view(torch.int32)[word] ^= 1

        monkeypatch.setattr(kernels, "write", spoilt)
        fast_encode.check_encoder.cache_clear()
        with pytest.raises(
            DeviceError, match=r"^cpu: encodes a test pattern wrongly into the fast"
        ):
            fast_encode.check_encoder(cpu)


_GUARDED = """
import numpy as np, torch
from fast_matrices import fast_matrices
from guard_pages import guarded
from vllm_dfloat.codec.fast_encode import encode
from vllm_dfloat.kernels import fast_encode as kernels

for name in ("37 x 333", "100 x 328", "a raw tile at the edge", "specials and a zero row"):
    weight = fast_matrices()[name]
    fast = encode(weight)
    bits = guarded(weight.view(np.int16))
    sizes = guarded(np.full(fast.layout.num_tiles, -1, np.int32))
    kernels.measure(bits, fast.layout.base // 2, sizes)
    assert np.array_equal(np.cumsum(sizes.numpy()), fast.starts[1:]), name
    sections = fast.low, fast.high, fast.starts, fast.entries
    words = [part.reshape(-1).view(np.uint32) for part in sections]
    written = [guarded(part if part is words[2] else np.zeros_like(part)) for part in words]
    kernels.write(bits, fast.layout.base // 2, *written)
    for found, expected in zip(written, words):
        assert np.array_equal(found.numpy(), expected), name
print("done")
"""


def test_no_access_leaves_the_tensors() -> None:
    done = run_python(_GUARDED, {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr}"
    assert done.stdout == "done\n"
