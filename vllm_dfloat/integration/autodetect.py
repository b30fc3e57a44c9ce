"""Recognition of official DFloat11 checkpoints, which vLLM would take for unquantized ones."""

from typing import Any

from vllm_dfloat.checkpoint.folder import CONFIG_KEY
from vllm_dfloat.integration.plugin import METHOD


def install() -> None:
    """Let vLLM's parser of Hugging Face configs see what `CONFIG_KEY` means. A second call changes nothing."""
    from vllm.transformers_utils import config as hf

    # register_config_parser would do the same, with a warning in every run on this machine.
    parsers = hf._CONFIG_FORMAT_TO_CONFIG_PARSER
    parser = parsers["hf"]
    if not getattr(parser, "knows_dfloat11", False):
        parsers["hf"] = _knowing_dfloat11(parser)


def _knowing_dfloat11(parser: Any) -> Any:
    class HFConfigParser(parser):  # type: ignore[misc]  # the base is whatever is registered now
        knows_dfloat11 = True

        def parse(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], Any]:
            config_dict, config = super().parse(*args, **kwargs)
            if CONFIG_KEY in config_dict and "quantization_config" not in config_dict:
                found = {"quant_method": METHOD, CONFIG_KEY: config_dict[CONFIG_KEY]}
                config_dict["quantization_config"] = found
            return config_dict, config

    return HFConfigParser
