"""Recognise official DFloat11 checkpoints; without this, vLLM loads them as unquantized ones."""

from functools import cache
from typing import Any

from vllm_dfloat.checkpoint.folder import CONFIG_KEY
from vllm_dfloat.integration.seam.names import METHOD


def install() -> None:
    """Make vLLM's parser of Hugging Face configs understand `CONFIG_KEY`. A second call changes nothing."""
    from vllm.transformers_utils import config as hf

    # register_config_parser does the same, but logs a warning in every run on this machine.
    parsers = hf._CONFIG_FORMAT_TO_CONFIG_PARSER
    parser = parsers["hf"]
    if not getattr(parser, "knows_dfloat11", False):
        parsers["hf"] = _knowing_dfloat11(parser)
    _let_compressed_lm_heads_be_seen()


def _let_compressed_lm_heads_be_seen() -> None:
    """Make vLLM's search for an LM head in checkpoints with tied weights (0.30 and later) recognise DFloat11 units."""
    from vllm.config import model

    if hasattr(model, "checkpoint_has_lm_head"):
        model.checkpoint_has_lm_head = checkpoint_has_lm_head


@cache
def checkpoint_has_lm_head(model: str, *, revision: str | None = None) -> bool | None:
    """Replace vLLM's function of this name: return whether there is an LM head, None if that is not known."""
    from vllm.transformers_utils.config import get_safetensors_params_metadata

    names = get_safetensors_params_metadata(model, revision=revision)
    if not names:
        return None
    return any(name.endswith(("lm_head.weight", "lm_head.encoded_exponent")) for name in names)


def _knowing_dfloat11(parser: Any) -> Any:
    class HFConfigParser(parser):  # type: ignore[misc]  # the base is whatever is registered now
        knows_dfloat11 = True

        def parse(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
            config_dict, config = super().parse(*args, **kwargs)
            options = config_dict.get("quantization_config") or {}  # of the user, without a method
            if CONFIG_KEY in config_dict and "quant_method" not in options:
                found = {"quant_method": METHOD, CONFIG_KEY: config_dict[CONFIG_KEY], **options}
                config_dict["quantization_config"] = found
            return config_dict, config

    return HFConfigParser
