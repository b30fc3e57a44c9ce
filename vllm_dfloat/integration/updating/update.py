"""Updates of a loaded model's weights: each takes effect as a whole, or not at all.

When a reload fails halfway in BF16 vLLM, layers are left without memory. Here the engine continues with its old
weights, and the caller gets an error of one sentence.
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.integration.layers import method
from vllm_dfloat.integration.seam import (
    compat,
    expert_kernels,
    layer_kinds,
    layerwise,
    reload_hooks,
)
from vllm_dfloat.integration.seam.incoming import AS_BEFORE, Incoming
from vllm_dfloat.integration.seam.names import logger
from vllm_dfloat.integration.updating import guards, views
from vllm_dfloat.integration.updating.filling import fill_in
from vllm_dfloat.integration.updating.receiving import LoadWeights, Pairs, Receiver
from vllm_dfloat.integration.updating.rehearsal import StoredWeights, rehearse, what_is_short
from vllm_dfloat.integration.updating.saved import SavedWeights

_COPY = torch.Tensor.copy_  # vLLM's sparse patches replace it while they load

# One update at a time in this process: a second one would take part in the first, and be lost or undone with it.
_ALONE = threading.RLock()


class Updates:
    """Applies updates to one model's weights, one after the other; a reload_hooks.Watcher of its reloads.

    Attributes:
        model: a loaded model with compressed layers.
        counts: whether a checkpoint is being compared with the model, so that nothing is loaded.
        fills_in: whether the current update may give only parts of a layer; the rest keeps its values.
    """

    def __init__(
        self, model: torch.nn.Module, load_weights: LoadWeights, vllm_config: Any, model_config: Any
    ) -> None:
        self.model = model
        self.counts = False
        self.fills_in = False
        self._receiver = Receiver(model, load_weights)
        self._vllm_config, self._model_config = vllm_config, model_config
        self._saved: SavedWeights | None = None
        self._names: set[str] = set()
        self._is_partial = self._keeps_rest = False
        self._depth = 0

    # Notifications from vLLM's layerwise reload.

    def begins(self) -> None:
        self._saved = SavedWeights(self.model)
        self._names = set()
        self.counts = self.fills_in = False

    def changes(self, layer: torch.nn.Module) -> None:
        if self._saved is not None:
            self._saved.save_layer(layer)

    def is_about_to_load(self, layer: torch.nn.Module) -> None:
        found, expected = layerwise.arrived(layer)
        is_experts = layer_kinds.is_experts(layer)
        may_be_short = is_experts or found < expected
        short = what_is_short(layer, self._name_of(layer)) if may_be_short else ""
        is_matrix = is_experts or compat.holds_a_matrix(layer)
        self._is_partial = bool(short) if is_experts else found < expected
        self._keeps_rest = self.fills_in or not is_matrix
        if short and not self.fills_in:
            raise UnsupportedError(
                f"{short}; expected all, or none. {AS_BEFORE} "
                "Give all tensors of the layer to the same update, or to load_weights, which may be given parts."
            )

    def materialized(self, layer: torch.nn.Module) -> None:
        for view in views.of(layer).values():
            self.save_tensor(view)
        views.load_into(layer)
        if self._is_partial and self._keeps_rest:
            fill_in(layer, self._name_of(layer), needs_all=self.fills_in)
        if layer_kinds.is_experts(layer):
            expert_kernels.renew_cpu_kernel(layer)

    def _name_of(self, layer: torch.nn.Module) -> str:
        names = [name for name, module in self.model.named_modules() if module is layer]
        return names[0] if names else type(layer).__name__

    @contextmanager
    def finishing(self) -> Iterator[None]:
        with self.undone_on_error():
            try:
                yield
            except RuntimeError as error:
                raise UnsupportedError(
                    f"an update could not be finished: vLLM cannot process this model's weights again on this device "
                    f"({error}); expected a model whose weights it can reload. {AS_BEFORE} Start the engine with the "
                    "new checkpoint."
                ) from error
            self._derive_again()

    def _derive_again(self) -> None:
        """Let load_weights compute once more the tensors that it computed from weights that had not arrived.

        Raises:
            UnsupportedError: it cannot.
        """
        if self._saved is None or not (found := self._saved.left_without_values()):
            return
        reason = ""
        try:
            self._receiver.load_weights(iter(()))
        except Exception as error:
            reason = f" ({type(error).__name__}: {error})"
        if reason or self._saved.left_without_values():
            raise UnsupportedError(
                f"{', '.join(found)}: this model computes it from weights while it loads them, and could not do so in "
                f"this update{reason}. {AS_BEFORE} Start the engine with the new checkpoint."
            )

    # Methods for callers.

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Undo the current update if the enclosed code fails. When nested, the outermost makes the update final.

        Meanwhile another thread's update waits.
        """
        with _ALONE:
            self._depth += 1
            try:
                yield
            except BaseException:
                self.undo()
                raise
            finally:
                self._depth -= 1
            if not self._depth and not layerwise.is_open(self.model):
                self._saved = None

    def undo(self) -> None:
        """Restore all weights that the current update has changed."""
        saved, self._saved = self._saved, None
        if saved is not None:
            layerwise.abandon(self.model)
            saved.put_back(self.model, self._model_config)
            logger.warning("dfloat11: an update of the weights failed; all weights are as before")

    def save_tensor(self, tensor: torch.Tensor) -> None:
        """Save a tensor's values before code outside a reload writes to it."""
        if self._saved is None:
            self._saved = SavedWeights(self.model)
        self._saved.save_tensor(tensor)

    def load_weights(self, weights: Pairs, *args: Any, **kwargs: Any) -> Any:
        """Do what the model's load_weights does, within a reload or outside of one.

        Outside, vLLM reloads the layers for which weights are given. If only a part of a layer is given (q_proj of
        qkv_proj), the rest keeps its values, as if the part were written in place.

        Raises:
            UnsupportedError: a tensor does not fit the model.
        """
        if torch.Tensor.copy_ is not _COPY:
            raise UnsupportedError(_NO_PATCHES)
        # Before looking whether a reload is open, which another thread may be about to end.
        with _ALONE:
            return self._load(weights, *args, **kwargs)

    def _load(self, weights: Pairs, *args: Any, **kwargs: Any) -> Any:
        if layerwise.is_open(self.model):
            with self.undone_on_error():
                if isinstance(weights, StoredWeights):
                    self._rehearse(weights)
                return self._receive(weights, *args, **kwargs)
        with (
            self.undone_on_error(),
            layerwise.without_warnings(),
            compat.as_current(self._vllm_config),
        ):
            layerwise.begin(self.model)
            self.fills_in = True
            loaded = self._receive(weights, *args, **kwargs)
            layerwise.finish(self.model, self._model_config)
            return loaded

    def _rehearse(self, stored: StoredWeights) -> None:
        self.counts = True
        try:
            rehearse(self.model, self._receive, stored, self._vllm_config)
        finally:
            self.counts = False
            self._names.clear()

    def _receive(self, weights: Pairs, *args: Any, **kwargs: Any) -> Any:
        own_memory = isinstance(weights, StoredWeights) or self.counts
        current = Incoming(weights, self._names, own_memory)
        return self._receiver.receive(current, self.counts, *args, **kwargs)


_NO_PATCHES = (
    "sparse weight patches: they change single values in place, which compressed layers do not have; expected whole "
    "tensors. Nothing was changed. Use another backend of vLLM's weight transfer, reload_weights or load_weights."
)


def keep(model: torch.nn.Module, vllm_config: Any, model_config: Any) -> None:
    """Make every update of a loaded model's weights take effect as a whole or not at all."""
    load_weights: LoadWeights | None = getattr(model, "load_weights", None)
    if load_weights is None or not any(map(method.weights_of, model.modules())):
        return
    updates = Updates(model, load_weights, vllm_config, model_config)
    model.__dict__["load_weights"] = functools.wraps(load_weights)(
        lambda *args, **kwargs: updates.load_weights(*args, **kwargs)
    )
    reload_hooks.watch(model, updates)
    guards.guard(model)


def updates_of(model: torch.nn.Module) -> Updates | None:
    """Return the Updates of a model, or None if it has no compressed layers."""
    watcher = reload_hooks.watcher_of(model)
    return watcher if isinstance(watcher, Updates) else None
