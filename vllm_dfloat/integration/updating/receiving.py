"""An update's tensors on their way through the model's own load_weights, which may take, refuse or lose them."""

import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from vllm_dfloat.errors import DFloatError, UnsupportedError
from vllm_dfloat.integration.layers import lm_head_rows
from vllm_dfloat.integration.seam import expert_kernels, layerwise, loader_calls
from vllm_dfloat.integration.seam.direct_writes import DirectWrites
from vllm_dfloat.integration.seam.incoming import AS_BEFORE, Incoming
from vllm_dfloat.integration.updating.rehearsal import needs_data

Pairs = Iterable[tuple[str, torch.Tensor]]
LoadWeights = Callable[..., Any]


class Receiver:
    """Passes tensors to a model while a reload is open.

    Attributes:
        model: a model with compressed layers.
        load_weights: its own method, which knows nothing of updates.
    """

    def __init__(self, model: torch.nn.Module, load_weights: LoadWeights) -> None:
        self.model, self.load_weights = model, load_weights

    def receive(self, current: Incoming, counts: bool, *args: Any, **kwargs: Any) -> Any:
        """Return what load_weights returns for these pairs and further arguments.

        Args:
            current: the pairs.
            counts: whether they have no data, and serve to be compared with the model.

        Raises:
            UnsupportedError: a tensor does not fit the model.
            NotImplementedError: the model reads values, which these pairs do not have.
        """
        try:
            with (
                loader_calls.told_to(current.called),
                self._direct_writes(),
                expert_kernels.plain_names_of_experts(self.model),
            ):
                pairs = current if counts else lm_head_rows.readable_after(current, self.model)
                loaded = self.load_weights(pairs, *args, **kwargs)
            current.copy_kept()
            self._check_heard(loaded or ())
            return loaded
        except DFloatError:
            raise
        except Exception as error:
            if error is current.error:
                raise  # an error of the caller's iterator
            if counts and needs_data(error):
                raise NotImplementedError(str(error)) from error
            raise UnsupportedError(
                f"{current}: could not be loaded into this model ({type(error).__name__}: {error}); expected names and "
                f"shapes of the checkpoint that it was started from. {AS_BEFORE} Give such tensors."
            ) from error

    def _direct_writes(self) -> AbstractContextManager[Any]:
        """Pass on what a model writes past vLLM's weight loaders, if it does not say what it has loaded.

        What others say is compared with what has arrived (`_check_heard`).
        """
        says = inspect.signature(self.load_weights).return_annotation
        return (
            DirectWrites(self.model) if says in (inspect.Signature.empty, None) else nullcontext()
        )

    def _check_heard(self, loaded: Iterable[str]) -> None:
        """Refuse a weight that the model reports as loaded although nothing arrived: it wrote to a meta tensor."""
        modules = dict(self.model.named_modules())
        for name in loaded:
            path, _, leaf = name.rpartition(".")
            layer = modules.get(path)
            if layer is not None and layerwise.is_deaf(layer, leaf):
                raise UnsupportedError(
                    f"{name}: this model writes it past vLLM's weight loaders, which an update needs, so what was "
                    f"given would be lost; expected layers other than this. {AS_BEFORE} Give the others alone, or "
                    "start the engine with the new checkpoint."
                )
