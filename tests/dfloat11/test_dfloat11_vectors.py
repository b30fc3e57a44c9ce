"""Every vector of the official package: bit exact if it can be decoded, refused if not."""

import re
from pathlib import Path

import numpy as np
import pytest
from dfloat11_helpers import (
    MODEL_VECTORS,
    VECTORS,
    edge_originals,
    encode,
    original_shapes,
    originals,
    sha256,
    stored_unit,
    write_checkpoint,
)

from vllm_dfloat.checkpoint.reader import open_checkpoint
from vllm_dfloat.checkpoint.weights import iter_weights
from vllm_dfloat.dfloat11 import reference
from vllm_dfloat.dfloat11.decode import decode_unit
from vllm_dfloat.errors import FormatError

EDGE_UNITS = open_checkpoint(VECTORS / "edge-good-df11").units


@pytest.mark.parametrize("name", EDGE_UNITS)
def test_edge_unit_decodes_to_its_original_bits(name: str) -> None:
    unit = EDGE_UNITS[name].load()
    assert np.array_equal(decode_unit(unit), edge_originals()[name])


# The oracle is slow: only the fast decoder decodes the two large units.
@pytest.mark.parametrize("name", [n for n, e in EDGE_UNITS.items() if e.num_weights < 20_000])
def test_reference_decodes_edge_unit_to_its_original_bits(name: str) -> None:
    assert np.array_equal(reference.decode(EDGE_UNITS[name].load()), edge_originals()[name])


@pytest.mark.parametrize("vector", MODEL_VECTORS)
def test_model_checkpoint_gives_every_original_tensor_bit_for_bit(vector: str) -> None:
    checkpoint = open_checkpoint(VECTORS / f"{vector}-df11")
    expected = originals()[vector]
    found = {}
    for name, bits in iter_weights(checkpoint, original_shapes(vector)):
        assert name not in found
        found[name] = {"shape": list(bits.shape), "sha256": sha256(bits)}
    assert found == expected


@pytest.mark.parametrize("name", EDGE_UNITS)
def test_test_encoder_makes_the_official_bytes_again(name: str) -> None:
    # Bug caught: an encoder that misreads the format in the same way as the decoder, and so proves nothing.
    stored = stored_unit("edge-good", name)
    made = encode(edge_originals()[name], tuple(stored["split_positions"].tolist()))
    assert made.keys() == stored.keys()
    for field in stored:
        assert np.array_equal(made[field], stored[field]), field


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("inf_and_nan", "exponent 255 has a code of 15 bits; exponents from 240 on"),
        ("exponent_240", "exponent 240 has a code of 17 bits; exponents from 240 on"),
        ("exponent_254", "exponent 254 has a code of 17 bits; exponents from 240 on"),
        ("all_256", "exponent 255 has a code of 7 bits; exponents from 240 on"),
        ("rows19", "found 19; expected 2 to 18 rows"),
    ],
)
def test_undecodable_vector_is_refused_with_file_tensor_and_numbers(
    name: str, message: str, tmp_path: Path
) -> None:
    directory = write_checkpoint(tmp_path, {name: stored_unit("edge-bad-must-refuse", name)})
    with pytest.raises(FormatError, match=re.escape(message)) as error:
        open_checkpoint(directory).validate()
    assert str(error.value).startswith(f"{directory}/model.safetensors: {name}.luts: ")


def test_directory_of_undecodable_vectors_is_refused_when_opened() -> None:
    with pytest.raises(FormatError, match=r"^\S+/model.safetensors: rows19.luts: found 19"):
        open_checkpoint(VECTORS / "edge-bad-must-refuse-df11")


def test_worked_example_of_the_format_decodes_to_its_stated_weights(tmp_path: Path) -> None:
    luts = np.zeros((2, 256), np.uint8)
    for first, symbol in ((0, 0), (64, 120), (128, 121), (192, 122), (240, 118)):
        luts[0, first:] = symbol
    luts[1, [0, 118, 120, 121, 122]] = 2, 4, 2, 2, 3
    unit = {
        "encoded_exponent": np.frombuffer(bytes.fromhex("6c17b7"), np.uint8),
        "sign_mantissa": np.frombuffer(bytes.fromhex("128501008010ff112a"), np.uint8),
        "luts": luts,
        "output_positions": np.frombuffer(bytes.fromhex("0000000009000000"), np.uint8),
        "gaps": np.zeros(320, np.uint8),
        "split_positions": np.zeros(0, np.int64),
    }
    directory = write_checkpoint(tmp_path, {"nine": unit})
    loaded = open_checkpoint(directory).units["nine"].load()
    words = "3c12 bc85 3d01 0000 8000 3c90 bb7f 3c11 3caa"
    expected = [int(word, 16) for word in words.split()]
    assert decode_unit(loaded).tolist() == expected
    assert reference.decode(loaded).tolist() == expected
