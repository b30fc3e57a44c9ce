"""Stored weights: their names, shapes and dtypes, compared with the config."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vllm_dfloat.checkpoint.folder import is_dfloat11
from vllm_dfloat.checkpoint.listing import weight_files
from vllm_dfloat.checkpoint.plain_model import bf16_tensors, is_same
from vllm_dfloat.checkpoint.quantized import refuse_quantized_files
from vllm_dfloat.checkpoint.reader import open_checkpoint
from vllm_dfloat.errors import FormatError, UnsupportedError
from vllm_dfloat.plan.architectures import name_in_vllm
from vllm_dfloat.plan.config import ModelConfig
from vllm_dfloat.plan.weights import Weight
from vllm_dfloat.storage.stored_tensor import StoredTensor

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class Files:
    """The contents of a folder's weight files, from their headers. All names are vLLM's.

    Attributes:
        folder: where they are.
        is_dfloat11: whether they are in the official format.
        tensors: those that are stored uncompressed, by name.
        names: all tensors of the model, also those in units.
        code_bits: bits per weight of each unit's codes, by the unit's name.
    """

    folder: Path
    is_dfloat11: bool
    tensors: Mapping[str, StoredTensor]
    names: frozenset[str]
    code_bits: Mapping[str, float] = field(default_factory=dict)

    @property
    def dtypes(self) -> Counter[str]:
        """How many tensors have which dtype."""
        return Counter(tensor.dtype for tensor in self.tensors.values())


def read_files(folder: Path, config: ModelConfig) -> Files | None:
    """Return the contents of the folder's safetensors files, None if there are none.

    Raises:
        FormatError: a file is damaged, or the model is not whole.
        UnsupportedError: quantized weights.
    """
    refuse_quantized_files(folder, {})  # a file beside config.json may say so
    if not weight_files(folder):
        return None
    if not is_dfloat11(folder):
        found = bf16_tensors(folder)
        refuse_quantized_files(folder, found)
        tensors = {name_in_vllm(name, config): tensor for name, tensor in found.items()}
        return Files(folder, False, tensors, frozenset(tensors))
    checkpoint = open_checkpoint(folder)  # refuses one that is not whole
    refuse_quantized_files(folder, checkpoint.plain)
    bits = {
        name_in_vllm(f"{name}.", config)[:-1]: 8 * unit.fields["encoded_exponent"].num_bytes / max(1, unit.num_weights)
        for name, unit in checkpoint.units.items()
    }  # fmt: skip
    tensors = {name_in_vllm(name, config): tensor for name, tensor in checkpoint.plain.items()}
    names = frozenset(name_in_vllm(name, config) for name in checkpoint.names)
    return Files(folder, True, tensors, names, bits)


def check_weights(weights: list[Weight], files: Files) -> list[str]:
    """Compare the files with the config; return the names of tensors that the plan leaves out.

    Raises:
        FormatError: a tensor is missing or has another shape.
        UnsupportedError: it has a dtype that is not in DTYPES.
    """
    expected = {name: shape for weight in weights for name, shape in weight.stored.items()}
    for name, shape in expected.items():
        if name not in files.names:
            raise FormatError(
                f"{files.folder}: no tensor {name}, which config.json makes {list(shape)}. "
                "A file is missing, or config.json belongs to another model."
            )
        tensor = files.tensors.get(name)
        if tensor and tensor.shape not in (shape, _transposed(shape)):
            raise FormatError(
                f"{tensor.where}: shape {list(tensor.shape)}; config.json makes it {list(shape)}. "
                "One of the two belongs to another model."
            )
        if tensor and tensor.dtype not in DTYPES:
            raise UnsupportedError(
                f"{tensor.where}: dtype {tensor.dtype}; a weight is expected in {', '.join(DTYPES)}. "
                "Plan with the BF16 original."
            )
    return sorted(files.names - set(expected))


def _transposed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the other shape in which these experts may be stacked: there are checkpoints of both kinds."""
    return (shape[0], shape[2], shape[1]) if len(shape) == 3 else shape


def stores_another_head(files: Files | None, config: ModelConfig) -> bool:
    """Return whether an LM head is stored that differs from the embedding, though config.json ties the two."""
    if files is None or not config.tied:
        return False
    head, embedding = (_find(files, name, config) for name in (HEAD, EMBEDDING))
    if head is None:
        return any(name.endswith(HEAD) for name in files.names)  # within a unit
    return embedding is None or not is_same(head, embedding)


def _find(files: Files, name: str, config: ModelConfig) -> StoredTensor | None:
    return files.tensors.get(name_in_vllm(name, config))
