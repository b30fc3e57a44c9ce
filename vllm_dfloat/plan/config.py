"""What config.json says about a model, as far as its memory depends on it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_dfloat.checkpoint.quantized import refuse_quantized_config
from vllm_dfloat.checkpoint.tied import TIED_KEY, tying_config
from vllm_dfloat.errors import FormatError, UnsupportedError, shown
from vllm_dfloat.plan.caches import Cached, layer_caches
from vllm_dfloat.plan.defaults import with_defaults
from vllm_dfloat.plan.keys import Keys
from vllm_dfloat.plan.kv_cache import EVERYTHING, Reach
from vllm_dfloat.plan.latent_caches import is_sparse, latent_width
from vllm_dfloat.plan.names import with_common_names
from vllm_dfloat.plan.reaches import layer_reaches
from vllm_dfloat.plan.refusals import refuse_other_caches, refuse_unserved
from vllm_dfloat.plan.sizes import Sizes
from vllm_dfloat.storage.json_file import MAX_CONFIG_BYTES, read_object

MAX_LAYERS = 1 << 12
DTYPES = ("bfloat16", "float16", "float32")
_SCALED_ALREADY = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")


@dataclass(frozen=True)
class ModelConfig(Sizes):
    """The sizes of a language model, and of its towers for images or sound.

    Attributes:
        where: the file they come from, for messages.
        entries: the config of the language model, for entries that only some architectures have.
        architecture: the class that Transformers and vLLM load, such as "LlamaForCausalLM".
        whole: the whole config; in multimodal models `entries` are a part of it.
        dtype: of the weights, one of DTYPES; "" if the config has none.
        hidden, vocab, heads, kv_heads, head_dim: as usual.
        latent: numbers per token and layer in the cache of multi-head latent attention; 0 for keys and values.
        context: longest sequence that the model was trained for, in tokens.
        tied: whether the LM head is the embedding.
        reaches: how far the attention of each transformer block looks back.
        caches: what layers keep of a request; a block may have none, one, or two.
    """

    architecture: str
    whole: Sizes
    dtype: str
    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    latent: int
    context: int
    tied: bool
    reaches: tuple[Reach, ...] = field(default=())
    caches: tuple[Cached, ...] = field(default=())

    @property
    def num_layers(self) -> int:
        return len(self.reaches)

    @property
    def has_keys(self) -> bool:
        """Whether any layer caches keys and values, or latent vectors."""
        return any(isinstance(cached.kind, Keys) for cached in self.caches)

    @property
    def has_reaches(self) -> bool:
        """Whether the attention of some layers is limited."""
        return any(reach != EVERYTHING for reach in self.reaches)


def read_model_config(file: Path) -> ModelConfig:
    """Return the sizes in a config.json.

    Raises:
        FormatError: not JSON, or a size is missing or impossible.
        UnsupportedError: quantized weights, or a cache that is not known.
    """
    where = str(file)
    found = read_object(file, MAX_CONFIG_BYTES)
    if not found:
        raise FormatError(f"{where}: is empty; expected a model's config.")
    architecture = _architecture(found, where)
    refuse_unserved(architecture, where)
    refuse_quantized_config(found, where)
    whole = Sizes(where, found)
    own = whole.part("text_config").entries or found
    model_type = Sizes(where, own).text("model_type", whole.text("model_type"))
    named = with_common_names(own, model_type)
    text = Sizes(where, with_defaults(named, model_type, is_part=own is not found))
    refuse_other_caches(text, model_type)
    num_layers = text.size("num_hidden_layers")
    if num_layers > MAX_LAYERS:
        raise FormatError(f"{where}: num_hidden_layers is {num_layers}; at most {MAX_LAYERS}.")
    hidden, heads = text.size("hidden_size"), text.size("num_attention_heads")
    kv_heads = text.size("num_key_value_heads", heads)
    head_dim = text.size("head_dim", max(1, hidden // heads))
    latent = latent_width(text, model_type)
    reaches = layer_reaches(text, model_type, num_layers)
    keys = Keys(kv_heads, head_dim, latent, is_sparse=is_sparse(text, model_type))
    return ModelConfig(
        where=where,
        entries=text.entries,
        architecture=architecture,
        whole=whole,
        dtype=_dtype(found, own, where),
        hidden=hidden,
        vocab=text.size("vocab_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        latent=latent,
        context=_context(text, model_type),
        tied=(whole if tying_config(found) is found else text).flag(TIED_KEY),
        reaches=reaches,
        caches=layer_caches(text, model_type, keys, reaches),
    )


def _architecture(found: Mapping[str, Any], where: str) -> str:
    architectures = found.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise FormatError(
            f"{where}: `architectures` is {shown(architectures)}; expected a list of one."
        )
    if not isinstance(architectures[0], str):
        raise FormatError(
            f"{where}: `architectures` begins with {shown(architectures[0])}; expected the name of a class."
        )
    return architectures[0]


def _dtype(found: Mapping[str, Any], own: Mapping[str, Any], where: str) -> str:
    names = [entries.get(name) for entries in (found, own) for name in ("dtype", "torch_dtype")]
    dtype = next((name for name in names if name is not None), "")
    text = dtype.removeprefix("torch.") if isinstance(dtype, str) else None
    if text is None or (text and text not in DTYPES):
        raise UnsupportedError(
            f"{where}: dtype is {shown(dtype)}; plan knows {', '.join(DTYPES)}. Plan with the BF16 original."
        )
    return text


def _context(text: Sizes, model_type: str) -> int:
    """Return the context that vLLM takes: the positions of training, times the scaling if it is not included."""
    length = text.size("max_position_embeddings")
    if model_type.startswith("gemma3"):  # scaling is included
        return length
    rope = next((p for n in ("rope_parameters", "rope_scaling") if (p := text.part(n)).entries), None)  # fmt: skip
    if rope is None or rope.text("rope_type", rope.text("type")) in _SCALED_ALREADY:
        return length
    return int(length * rope.ratio("factor", 1.0))
