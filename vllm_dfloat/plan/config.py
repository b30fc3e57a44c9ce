"""What config.json says about a model, as far as memory depends on it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dfloat.checkpoint.dfloat11 import open_checkpoint
from vllm_dfloat.checkpoint.folder import CONFIG_FILE, MAX_CONFIG_BYTES, is_dfloat11
from vllm_dfloat.checkpoint.json_file import read_object
from vllm_dfloat.checkpoint.quantized import refuse_quantized_config
from vllm_dfloat.errors import FormatError, UnsupportedError, shown

MAX_SIZE = (
    1 << 32
)  # no size in a config is as large; a larger one is a mistake, and would take forever
MAX_LAYERS = 1 << 12
GEMMA3_PATTERN = 6  # every sixth layer of Gemma 3 sees everything, unless its config says otherwise


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a decoder.

    Attributes:
        where: the file they come from, for messages.
        architecture: the class that Transformers and vLLM load, such as "LlamaForCausalLM".
        hidden, vocab, heads, kv_heads, head_dim: as usual.
        context: longest sequence that the model was made for, in tokens.
        tied: whether the LM head is the embedding.
        windows: per layer how far attention looks back, in tokens; None for everything.
        entries: the config of the language model, for what only some architectures have.
    """

    where: str
    architecture: str
    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    tied: bool
    windows: tuple[int | None, ...]
    entries: Mapping[str, Any]

    @property
    def num_layers(self) -> int:
        return len(self.windows)

    def size(self, name: str, default: int | None = None) -> int:
        """Return a size from the config; see `_size` for what is refused."""
        return _size(self.entries, name, self.where, default)


def config_file(model: str) -> Path:
    """Return the config.json of a folder, of a file given itself, or of a hub id (from its cache or the hub).

    Raises:
        FormatError: there is none.
    """
    path = Path(model)
    if path.is_file():
        return path
    if path.is_dir() or model.count("/") != 1 or model.startswith((".", "~", "/")):
        if not (path / CONFIG_FILE).is_file():
            if path.is_dir() and is_dfloat11(path):
                open_checkpoint(path)  # which says what a half-made one needs
            what = f"no {CONFIG_FILE} in it" if path.is_dir() else "no such file or folder"
            raise FormatError(
                f"{model}: {what}; expected a model's folder, its {CONFIG_FILE}, or a hub id."
            )
        return path / CONFIG_FILE
    from huggingface_hub import hf_hub_download  # comes with transformers

    try:
        return Path(hf_hub_download(model, CONFIG_FILE))
    except Exception as error:  # network, rights, cache: a dozen kinds
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise FormatError(
            f"{model}: no such folder, and its {CONFIG_FILE} cannot be fetched from the hub "
            f"({type(error).__name__}: {reason}). Give a folder or a {CONFIG_FILE}."
        ) from error


def read_model_config(file: Path) -> ModelConfig:
    """Return the sizes in a config.json.

    Raises:
        FormatError: not JSON, or a size is missing or impossible.
        UnsupportedError: quantized weights, or an attention whose cache is not made of keys and values per head.
    """
    where = str(file)
    whole = read_object(file, MAX_CONFIG_BYTES)
    if not whole:
        raise FormatError(f"{where}: is empty; expected a model's config.")
    architectures = whole.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise FormatError(
            f"{where}: `architectures` is {shown(architectures)}; expected a list of one."
        )
    refuse_quantized_config(whole, where)
    text = whole.get("text_config")
    entries = text if isinstance(text, Mapping) else whole
    if entries.get("kv_lora_rank"):
        raise UnsupportedError(
            f"{where}: kv_lora_rank, multi-head latent attention; plan knows caches of keys and values "
            "per head. Start vLLM to see what fits."
        )
    heads = _size(entries, "num_attention_heads", where)
    hidden = _size(entries, "hidden_size", where)
    num_layers = _size(entries, "num_hidden_layers", where)
    if num_layers > MAX_LAYERS:
        raise FormatError(f"{where}: num_hidden_layers is {num_layers}; at most {MAX_LAYERS}.")
    return ModelConfig(
        where=where,
        architecture=str(architectures[0]),
        hidden=hidden,
        vocab=_size(entries, "vocab_size", where),
        heads=heads,
        kv_heads=_size(entries, "num_key_value_heads", where, heads),
        head_dim=_size(entries, "head_dim", where, max(1, hidden // heads)),
        context=_size(entries, "max_position_embeddings", where),
        tied=bool(
            whole.get("tie_word_embeddings", entries.get("tie_word_embeddings", _tied(whole)))
        ),
        windows=_windows(entries, num_layers, where),
        entries=entries,
    )


def _tied(whole: Mapping[str, Any]) -> bool:
    """Gemma's configs leave out that the LM head is the embedding."""
    return str(whole.get("model_type", "")).startswith("gemma")


def _size(entries: Mapping[str, Any], name: str, where: str, default: int | None = None) -> int:
    """Return entry `name`, a positive integer.

    Raises:
        FormatError: it is missing without a default, or anything but an integer from 1 to MAX_SIZE.
    """
    value = entries.get(name)
    if value is None and default is not None:
        return default
    if type(value) is not int or not 0 < value <= MAX_SIZE:
        raise FormatError(f"{where}: {name} is {shown(value)}; expected a positive integer.")
    return value


def _windows(entries: Mapping[str, Any], num_layers: int, where: str) -> tuple[int | None, ...]:
    """Return per layer how many tokens attention looks back, as vLLM reads it; None for all."""
    if not entries.get("sliding_window") or entries.get("use_sliding_window") is False:
        return (None,) * num_layers
    window = _size(entries, "sliding_window", where)
    types = entries.get("layer_types")
    if types is None and str(entries.get("model_type", "")).startswith("gemma3"):
        every = _size(entries, "sliding_window_pattern", where, GEMMA3_PATTERN)
        types = ["sliding_attention" if (i + 1) % every else "full" for i in range(num_layers)]
    if types is None:
        return (window,) * num_layers
    if not isinstance(types, list) or len(types) < num_layers:
        raise FormatError(
            f"{where}: layer_types is no list of {num_layers} entries, one per layer."
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types[:num_layers])
