"""A folder of safetensors files, whatever it holds."""

import json
from pathlib import Path

from vllm_dfloat.checkpoint.safetensors_file import StoredTensor, read_header
from vllm_dfloat.errors import FormatError, UnsupportedError

CONFIG_FILE = "config.json"


def has_dfloat11_config(path: Path) -> bool:
    """Return whether the folder says it is an official DFloat11 checkpoint, of today's or of the legacy layout."""
    if any(path.glob("*.pkl")):
        return True  # open_checkpoint says what is wrong with it
    file = path / CONFIG_FILE
    if not file.is_file():
        return False
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{file}: is not valid JSON: {error}.") from error
    return isinstance(config, dict) and "dfloat11_config" in config


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return every tensor of all *.safetensors files in folder `path`, by name.

    Raises:
        FormatError: no such folder, no safetensors file in it, a damaged file, or a tensor stored twice.
    """
    if not path.is_dir():
        raise FormatError(f"{path}: no such folder; expected one with *.safetensors files.")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        if any(path.glob("*.bin")) or any(path.glob("*.pt")):
            raise UnsupportedError(
                f"{path}: holds PyTorch pickle files only; pickles are never read, since reading can run "
                "code. Convert the model to safetensors."
            )
        raise FormatError(f"{path}: no *.safetensors file; expected at least one.")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise FormatError(
                    f"{file.name}: {name}: also stored in {tensors[name].file.name}; expected once. "
                    "Remove the file that does not belong here."
                )
            tensors[name] = tensor
    return tensors
