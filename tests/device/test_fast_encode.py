"""The encoder of the fast layout, by PyTorch's operations, against the oracle."""

import numpy as np
import pytest
import torch
from fast_matrices import fast_matrices, trained_like
from helpers import Bits, gaussian, to_torch

from vllm_dfloat.codec import fast_reference
from vllm_dfloat.codec.fast_layout import MAX_ESCAPES, RAW_ENTRIES, FastTensor
from vllm_dfloat.device import fast_encode

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


def test_chunks_of_a_matrix_give_the_same_bytes_as_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = encoded(MATRICES["raw tiles"]).payload
    monkeypatch.setattr(fast_encode, "CHUNK_WEIGHTS", 1)  # a row of tiles at a time
    assert np.array_equal(encoded(MATRICES["raw tiles"]).payload, whole)


def test_a_tile_is_raw_from_513_escapes_on() -> None:
    fast = encoded(MATRICES["raw tiles"])
    counts = np.diff(fast.starts.astype(np.int64)).reshape(fast.layout.tile_rows, -1)
    assert counts[2, 2] == MAX_ESCAPES
    assert counts[3, 2] == counts[1, 0] == counts[9, 7] == RAW_ENTRIES


def test_gaussian_and_trained_like_weights_take_12_bits() -> None:
    assert encoded(gaussian(1024, 2048)).bits_per_weight < 12.01
    assert encoded(trained_like(1024, 2048)).bits_per_weight < 12.05


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
