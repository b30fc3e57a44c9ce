"""Refuse models with quantized weights (FP8, GPTQ, AWQ, MXFP4, bitsandbytes, ...), whether config or files say so."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from vllm_dfloat.errors import UnsupportedError, shown
from vllm_dfloat.storage.json_file import MAX_CONFIG_BYTES, read_object
from vllm_dfloat.storage.stored_tensor import StoredTensor

METHOD = "dfloat11"  # ours: a quantization_config of BF16 weights may hold options for serving
_MODELOPT_FILE = "hf_quant_config.json"
# Of most methods; of the first versions of compressed-tensors; of MLX.
_KEYS = ("quantization_config", "compression_config", "quantization")
_METHOD_KEYS = ("quant_method", "quant_algo", "format")
_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32")
# Of GPTQ, AWQ, compressed-tensors, ModelOpt, DeepSeek, bitsandbytes.
_LEAVES = re.compile(
    r"(.*[._])?(qweight|qzeros|weight_packed|weight_scale(_inv|_2)?|weight_global_scale|weight_zero_point"
    r"|SCB|absmax|nested_absmax|quant_map|nested_quant_map|quant_state\.bitsandbytes__\w+)"
)
_PACKED = re.compile(r"(.*[._])?(weight|blocks|packed)")  # quantized if they hold integers


def refuse_quantized_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse a config.json that says that the weights are quantized.

    Args:
        config: its content.
        where: its path, for the message.

    Raises:
        UnsupportedError: it does.
    """
    for place, key, value in _quantization_configs(config):
        if value and (value.get("quant_method") if isinstance(value, Mapping) else "") != METHOD:
            _refuse(where, f"{place}{key} is {_method(value)}")


def refuse_quantized_files(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse a model whose files show that the weights are quantized, whatever its config says.

    Raises:
        UnsupportedError: they do.
    """
    modelopt = (read_object(folder / _MODELOPT_FILE, MAX_CONFIG_BYTES) or {}).get("quantization")
    if isinstance(modelopt, Mapping) and modelopt.get("quant_algo"):  # else of the KV cache
        _refuse(str(folder / _MODELOPT_FILE), f"quantization is {_method(modelopt)}")
    found = [tensor for tensor in tensors.values() if _is_quantized(tensor)]
    if found:
        first = found[0]
        more = f" and {len(found) - 1} other tensors are" if len(found) > 1 else " is"
        _refuse(
            str(folder),
            f"{first.name} ({first.dtype} {list(first.shape)}){more} of quantized weights",
        )


def _quantization_configs(config: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield (path of the part, key, value) of every quantization config, of the model and of its parts."""
    parts = [("", config)]
    parts += [(f"{key}.", value) for key, value in config.items() if isinstance(value, Mapping)]
    for place, part in parts:
        if place.removesuffix(".") not in _KEYS:
            yield from ((place, key, part[key]) for key in _KEYS if key in part)


def _method(value: Any) -> str:
    if isinstance(value, Mapping):
        named = [value[key] for key in _METHOD_KEYS if value.get(key)]
        return shown((named or [value])[0])
    return shown(value)


def _is_quantized(tensor: StoredTensor) -> bool:
    if tensor.dtype.startswith("F8") or _LEAVES.fullmatch(tensor.name):
        return True
    is_packed = tensor.dtype in _INTEGERS and len(tensor.shape) > 1
    return is_packed and bool(_PACKED.fullmatch(tensor.name))


def _refuse(where: str, what: str) -> NoReturn:
    raise UnsupportedError(
        f"{where}: {what}, so its weights are not BF16; expected a model in BF16. Take the original, from which this "
        "one was quantized."
    )
