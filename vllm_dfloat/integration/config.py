"""The quantization config `dfloat11`: decides for each layer whether it is compressed."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from vllm_dfloat.checkpoint.folder import CONFIG_KEY
from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.integration.seam import compat, fused_names, gemms, layer_kinds
from vllm_dfloat.integration.seam.names import ASKED, METHOD, logger
from vllm_dfloat.integration.seam.options import (
    AUTO,
    Options,
    misplaced,
    of_config,
    origin_of,
    with_command_line,
)
from vllm_dfloat.integration.seam.refusal import refusal

NAMELESS_EMBEDDING = "model.embed_tokens"  # for models that create the embedding without a name


class DFloat11Config(QuantizationConfig):  # type: ignore[misc]  # vLLM is untyped
    """Options of one run, and the choice of a method for each layer.

    vLLM creates it in the front-end process and sends it, pickled, to every worker.
    """

    def __init__(self, options: Options | None = None, is_official: bool = False) -> None:
        super().__init__()
        self.options = options or Options()
        self.is_official = is_official
        self._started = False
        self._logged: set[str] = set()
        self._fast_layers: frozenset[str] = frozenset()
        self._mapper: Any = None  # vLLM's, from names in files to those in its model
        self._unused_ignore = set(self.options.ignore)
        _install()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _install()  # runs in each process that receives this config: the engine's and the ranks'

    def __repr__(self) -> str:
        return f"DFloat11Config({self.options})"

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "DFloat11Config":
        """Return the config for a config.json's `quantization_config`."""
        return cls(of_config(config), is_official=CONFIG_KEY in config)

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        self.is_official = self.is_official or hasattr(hf_config, CONFIG_KEY)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self._mapper = hf_to_vllm_mapper

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        self.start()
        if isinstance(layer, LinearBase):
            from vllm_dfloat.integration.layers.linear import DFloat11LinearMethod

            if self._is_left_alone(layer, prefix):
                return UnquantizedLinearMethod()
            return DFloat11LinearMethod(prefix, self._options_of(prefix))
        if isinstance(layer, VocabParallelEmbedding):
            return self._embedding_method(layer, prefix)
        if layer_kinds.is_experts(layer):  # models have subclasses, such as GptOssRoutedExperts
            return self._experts_method(layer, prefix)
        return None  # vLLM's default for this kind of layer

    def _experts_method(self, layer: Any, name: str) -> QuantizeMethodBase | None:
        from vllm_dfloat.integration.layers.experts import DFloat11ExpertsMethod

        if self._is_left_alone(layer, name):
            return None
        method = DFloat11ExpertsMethod(layer.moe_config, name, self._options_of(name))
        if not method.can_compress:
            self.log_left_alone(f"experts (vLLM's kernel {method.backend} holds them itself)")
            return None
        if method.decodes_all:
            self._log_once(
                f"all experts of a layer are decoded, also those without tokens ({method.why_all})"
            )
        if method.decoded_line:
            self._log_once(method.decoded_line)
        return method

    def _embedding_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        from vllm_dfloat.integration.layers.embedding import (
            DFloat11EmbeddingMethod,
            IgnoredLMHeadMethod,
        )

        layer.__dict__[ASKED] = True
        is_head = isinstance(layer, ParallelLMHead)
        name = prefix or ("lm_head" if is_head else NAMELESS_EMBEDDING)
        if self._is_left_alone(layer, name) or self._is_read_as_head(is_head):
            return IgnoredLMHeadMethod() if is_head else None
        return DFloat11EmbeddingMethod(name, self._options_of(name))

    def _options_of(self, name: str) -> Options:
        """Return the options of one layer, of which "auto" chooses the layout."""
        if self.options.layout != AUTO:
            return self.options
        is_fast = fused_names.is_chosen(name, self._fast_layers, self.packed_modules_mapping)
        return replace(self.options, layout="fast" if is_fast else "packed", kv_tokens=None)

    def _is_read_as_head(self, is_head: bool) -> bool:
        model_config = getattr(compat.current_config(), "model_config", None)
        dtype = layer_kinds.other_dtype_of_head(model_config)
        if dtype is None or not (is_head or layer_kinds.may_be_lm_head(model_config)):
            return False
        self.log_left_alone(
            f"the LM head (vLLM reads its BF16 weight, since head_dtype is {dtype})"
        )
        return True

    def _is_left_alone(self, layer: torch.nn.Module, name: str) -> bool:
        self._unused_ignore = {
            entry
            for entry in self._unused_ignore
            if not compat.touches(name, entry, self.packed_modules_mapping)
        }
        ignore, fused = self.options.ignore, self.packed_modules_mapping
        origin = origin_of("ignore", compat.current_config())
        if fused_names.stays_bf16(name, ignore, fused, origin):
            return True
        if compat.is_gate(layer):
            self.log_left_alone("GateLinear (router of a mixture of experts)")
            return True
        if compat.is_read_by_latent_attention(name):
            self.log_left_alone("kv_b_proj (latent attention reads its BF16 weight in every step)")
            return True
        dtype = getattr(layer, "params_dtype", torch.get_default_dtype())
        if dtype != torch.bfloat16:
            self.log_left_alone(f"{type(layer).__name__} with {dtype} weights")
            return True
        return False

    def log_unused_ignore(self, num_stages: int) -> None:
        """After the model is built: warn of entries of `ignore` that match none of its layers on this stage."""
        unused = [entry for entry in self.options.ignore if entry in self._unused_ignore]
        if unused:
            logger.warning(
                "dfloat11: ignore: %s matches no layer%s that would be compressed; names are those of vLLM's model, "
                "such as model.layers.0.mlp.down_proj",
                ", ".join(map(repr, unused)),
                " of this pipeline stage" if num_stages > 1 else "",
            )

    def log_left_alone(self, kind: str) -> None:
        """Log once per run that layers of this kind stay BF16."""
        self._log_once(f"left uncompressed: {kind}")

    def _log_once(self, line: str) -> None:
        if line not in self._logged:
            self._logged.add(line)
            logger.info("dfloat11: %s", line)

    def checked_options(self, config: Any) -> Options:
        """Return the options with those of the command line.

        Raises:
            UnsupportedError: an unknown option, a wrong value, values that exclude each other, or settings of vLLM's
                that compressed weights do not work with.
        """
        options = with_command_line(self.options, config)
        self._warn_of_misplaced(config.additional_config)
        if options.mode == "fused" and gemms.is_batch_invariant():
            raise UnsupportedError(
                "mode 'fused' with VLLM_BATCH_INVARIANT: it gives small batches other bits than large ones; expected "
                "mode 'exact', or 'fused-exact' with layout 'fast' or 'auto'. Leave out mode, or the variable."
            )
        if reason := refusal(config):
            raise UnsupportedError(f"dfloat11 does not work with {reason}")
        return options

    def _warn_of_misplaced(self, extra: Any) -> None:
        """Warn once of options that were not given under the plugin's name; others may use the same words."""
        line = misplaced(extra, METHOD) if isinstance(extra, Mapping) else ""
        if line and line not in self._logged:
            self._logged.add(line)
            logger.warning("dfloat11: %s", line)

    def start(self) -> None:
        """Once, when a VllmConfig is current: read the command line's options, and refuse those that cannot work."""
        from vllm_dfloat.integration.compiling import settings

        config = compat.current_config()
        if self._started or config is None:
            return
        self.options = self.checked_options(config)
        self._unused_ignore = set(self.options.ignore)
        self._check_official(str(config.load_config.load_format))
        settings.prepare(config)
        if self.options.layout == AUTO:
            from vllm_dfloat.integration.loading import auto_layout

            layers, line = auto_layout.choose_for(self, config)
            self._fast_layers = fused_names.with_those_of_vllm(layers, self._mapper)
            self._log_once(line)
        self._started = True

    def _check_official(self, load_format: str) -> None:
        from vllm_dfloat.integration.loading import loader

        if self.is_official and not loader.reads_official(load_format):
            raise UnsupportedError(
                f"--load-format {load_format}: it cannot read an official DFloat11 checkpoint; "
                "expected auto, hf or safetensors."
            )


def _install() -> None:
    from vllm_dfloat.integration.loading import loader
    from vllm_dfloat.integration.updating import replies

    loader.install()
    replies.install()
    compat.let_numba_be_scanned()  # for the worker that vLLM starts next
