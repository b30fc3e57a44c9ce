"""Headers of safetensors files: what the safetensors library refuses is refused, by every command and by serving."""

import json
from pathlib import Path

import pytest
from safetensors import SafetensorError, safe_open

from vllm_dfloat.errors import DFloatError
from vllm_dfloat.storage.safetensors_read import read_header, read_names

ENTRY = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
METADATA = "__metadata__"


def write(folder: Path, header: str) -> Path:
    text = header.encode()
    file = folder / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    return file


@pytest.mark.parametrize(
    "header",
    [
        "\ufeff{" + ENTRY + "}",
        "{" + ENTRY.replace("[0,", "[-0,") + "}",
        "{" + ENTRY.replace("[1]", "[1, -0]") + "}",
        *(
            f'{{"{METADATA}": {metadata}, {ENTRY}}}'
            for metadata in (
                *('"x"', "[]", "1", "false", '{"a": 1}', '{"a": null}', '{"a": {"b": "c"}}'),
                *('{"a": NaN}', '{"a": -Infinity}', '{"a": "\\ud800"}', '{"\\udfff": "a"}'),
            )
        ),
    ],
)
def test_headers_that_the_safetensors_library_refuses_are_refused(
    tmp_path: Path, header: str
) -> None:
    # Bug caught: a file that BF16 vLLM refuses was compressed and served.
    file = write(tmp_path, header)
    with pytest.raises(SafetensorError), safe_open(file, "np"):
        pass
    for read in (read_header, read_names):
        with pytest.raises(DFloatError, match=r"^\S+/model.safetensors: "):
            read(file)


@pytest.mark.parametrize("metadata", ["null", "{}", '{"a": "\\ud83d\\ude00\\u00e9", "": ""}'])
def test_metadata_that_the_safetensors_library_reads_are_read(
    tmp_path: Path, metadata: str
) -> None:
    file = write(tmp_path, f' {{"{METADATA}": {metadata}, {ENTRY}}} \n')
    with safe_open(file, "np") as opened:
        assert read_names(file) == (list(opened.keys()), opened.metadata() or {})
    assert list(read_header(file)) == ["a"]
    assert read_names(file)[1] == (json.loads(metadata) or {})
