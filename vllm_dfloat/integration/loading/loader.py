"""Model loaders: subclasses of vLLM's that also read official DFloat11 checkpoints and log what was compressed."""

import time
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor import model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

from vllm_dfloat.checkpoint.folder import is_dfloat11
from vllm_dfloat.checkpoint.plain_model import each_once, repeated
from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.integration.loading.stored_weights import (
    Weights,
    biases_after_weights,
    official_weights,
    stored_in,
    wanted,
)
from vllm_dfloat.integration.seam import compat, layer_kinds, loader_calls, weight_files
from vllm_dfloat.integration.seam.arrivals import EXPECTED, Arrivals
from vllm_dfloat.integration.seam.direct_writes import DirectWrites
from vllm_dfloat.integration.seam.names import METHOD
from vllm_dfloat.integration.updating.rehearsal import StoredWeights
from vllm_dfloat.storage.read_ahead import read_ahead


def install() -> None:
    """Register our loaders for vLLM's load formats. A second call changes nothing.

    vLLM's register_model_loader does the same, but logs two lines per format.
    """
    ours = {DefaultModelLoader: DFloat11ModelLoader, DummyModelLoader: DFloat11DummyLoader}
    formats = model_loader._LOAD_FORMAT_TO_MODEL_LOADER
    for load_format, loader in list(formats.items()):
        if loader in ours:
            formats[load_format] = ours[loader]
        elif not issubclass(loader, _Reporting | _Refusing):
            formats[load_format] = type(loader.__name__, (_Refusing, loader), {})


def reads_official(load_format: str) -> bool:
    """Return whether official checkpoints can be read with this --load-format."""
    loader = model_loader._LOAD_FORMAT_TO_MODEL_LOADER.get(load_format)
    return loader in (DFloat11ModelLoader, DFloat11DummyLoader)


class _Reporting:
    """A mixin for vLLM's loaders: after loading, prepare groups and updates, and log what was compressed."""

    _vllm_config: Any = None
    _is_new = False  # whether the model has just been built

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> torch.nn.Module:
        self._vllm_config, self._is_new = vllm_config, model_config.quantization == METHOD
        if self._is_new:
            from vllm_dfloat.integration.seam import offloader

            offloader.install()
        model: torch.nn.Module = super().load_model(  # type: ignore[misc]  # vLLM's loader follows the mixin
            vllm_config=vllm_config, model_config=model_config, prefix=prefix
        )
        if model_config.quantization == METHOD:
            from vllm_dfloat.integration.compiling import settings
            from vllm_dfloat.integration.layers import (
                grouping,
                heads,
                proven_experts,
                proven_products,
                tying,
            )
            from vllm_dfloat.integration.loading import live_check, report
            from vllm_dfloat.integration.seam import offloader
            from vllm_dfloat.integration.updating import update, worker

            live_check.install()
            grouping.group_layers(model)
            settings.note_layouts(vllm_config, model)
            proven_products.prepare(model, model_config)
            proven_experts.prepare(model)
            heads.prepare(model, vllm_config, model_config)
            tying.warn_if_different(model, model_config)
            report.log_summary(model)
            update.keep(model, vllm_config, model_config)
            worker.install()
            offloader.finish_on_cpu()
            if not layer_kinds.is_draft(
                model_config
            ):  # the options name the target's layers; a draft may have others
                num_stages = vllm_config.parallel_config.pipeline_parallel_size
                vllm_config.quant_config.log_unused_ignore(num_stages)
        return model

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        if self._is_new:  # and not a reload
            from vllm_dfloat.integration.layers import unasked
            from vllm_dfloat.integration.seam import offloader

            self._is_new = False
            unasked.compress(model, self._vllm_config, model_config)
            offloader.check_host_memory(self._vllm_config)
        self._load(model, model_config)

    def _load(self, model: torch.nn.Module, model_config: Any) -> None:
        super().load_weights(model, model_config)  # type: ignore[misc]  # vLLM's loader follows the mixin


class _Refusing:
    """A mixin for vLLM's other loaders: refuse what cannot work before they look for their files and libraries."""

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> torch.nn.Module:
        if model_config.quantization == METHOD:
            compat.quant_config_of(vllm_config, model_config).start()
        model: torch.nn.Module = super().load_model(  # type: ignore[misc]  # vLLM's loader follows the mixin
            vllm_config=vllm_config, model_config=model_config, prefix=prefix
        )
        if model_config.quantization == METHOD:
            from vllm_dfloat.integration.layers import heads, proven_experts, proven_products

            proven_products.prepare(model, model_config)
            proven_experts.prepare(model)
            heads.prepare(model, vllm_config, model_config)
        return model


class DFloat11DummyLoader(_Reporting, DummyModelLoader):  # type: ignore[misc]  # vLLM is untyped
    """Creates random weights for --load-format dummy; they are compressed like real ones."""


class DFloat11ModelLoader(_Reporting, DefaultModelLoader):  # type: ignore[misc]  # vLLM is untyped
    """Gives vLLM's weight loaders (name, BF16 tensor) pairs of plain or official checkpoints; refuses missing ones."""

    enable_weights_track: bool | None
    _arrivals: Arrivals | None = None

    def _load(self, model: torch.nn.Module, model_config: Any) -> None:
        if model_config.quantization != METHOD:
            return super()._load(model, model_config)
        if self.enable_weights_track is None:  # not set by the user
            self.enable_weights_track = True  # vLLM's default for unquantized models only
        from vllm_dfloat.integration.layers import placeholder, tying
        from vllm_dfloat.integration.updating import views

        loader_calls.install()
        views.note(model)
        tying.prepare(model, self._vllm_config, model_config)
        self._arrivals, self._model_config = Arrivals(model), model_config
        try:
            with DirectWrites(model), self._arrivals, placeholder.while_loading():
                super()._load(model, model_config)
        finally:
            self._arrivals = None

    def track_weights_loading(
        self, model: torch.nn.Module, loaded_weights: set[str] | None, **version: Any
    ) -> None:
        """Refuse a model with weights that never arrived: those that BF16 vLLM misses, and all others.

        Raises:
            UnsupportedError: it names the missing weights.
        """
        if self._arrivals is None:
            return super().track_weights_loading(model, loaded_weights, **version)  # type: ignore[no-any-return]
        where = str(self._model_config.model)
        try:
            super().track_weights_loading(model, loaded_weights)  # the check of unquantized models
        except ValueError as error:
            raise UnsupportedError(f"{where}: {error}. {EXPECTED}") from error
        configs = self._vllm_config, self._model_config
        self._arrivals.check(
            model, where, lambda layer: layer_kinds.may_be_the_targets(layer, *configs)
        )

    def get_all_weights(self, model_config: Any, model: torch.nn.Module) -> Weights:
        if model_config.quantization != METHOD:
            return super().get_all_weights(model_config, model)  # type: ignore[no-any-return]
        pairs = self._stored_weights(model_config, model)
        if self._arrivals is None:  # a reload, which Updates passes on
            return pairs
        from vllm_dfloat.integration.layers import lm_head_rows

        return lm_head_rows.readable_after(pairs, model)

    def _stored_weights(self, model_config: Any, model: torch.nn.Module) -> Weights:
        # The files decide, not model_config: vLLM may reload from another folder. vLLM's choice of files does not work
        # for a DFloat11 folder, because an index there is that of the original checkpoint.
        folder = Path(model_config.model)
        if not folder.is_dir():
            folder, _ = weight_files.checkpoint_files(self, model_config, model)
        if is_dfloat11(folder):
            self.counter_before_loading_weights = time.perf_counter()  # for vLLM's log
            pairs = official_weights(folder, model_config.hf_config, model)
            # vLLM reads the secondary weights (other files, or other models); we do not read the headers of these.
            others = [
                self._get_weights_iterator(s) for s in getattr(model, "secondary_weights", ())
            ]
            if others:
                return StoredWeights(chain(pairs, *others), str(folder), ())
            return pairs
        stored = stored_in(weight_files.checkpoint_files(self, model_config, model)[1])
        is_all_read = weight_files.reads_all_files(self, model)
        # vLLM counts the elements that arrive for a layer, so no tensor may arrive twice.
        pairs = each_once(super().get_all_weights(model_config, model), repeated(stored))
        if weight_files.reads_lazily(self.load_config):
            pairs = read_ahead(pairs, wanted(stored, model))
        shapes = list({tensor.name: tensor.shape for tensor in stored if is_all_read}.items())
        return StoredWeights(biases_after_weights(pairs), str(model_config.model), shapes)
