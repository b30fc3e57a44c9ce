"""Encode official DFloat11 units on a GPU, and compare them there, with the kernels of kernels/dfloat11_encode.py.

DeviceCoder is a coder for dfloat11/encode.py; its bytes equal those of the CPU coder. Both use the code book that the
host makes. For each thread, the device holds one piece of a unit at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import torch

from vllm_dfloat.codec.arrays import I64Array, U8Array, U16Array, U32Array
from vllm_dfloat.codec.layout import SYMBOL_SHIFT, TILE_WEIGHTS
from vllm_dfloat.device.checks import MIN_CAPABILITY, check_device, needing_triton
from vllm_dfloat.device.unit_decode import decode_unit
from vllm_dfloat.dfloat11.coder import Book, Coder, Codes64
from vllm_dfloat.dfloat11.encode import as_unit, encode_unit
from vllm_dfloat.dfloat11.format import BLOCK_BITS, WINDOW_BITS
from vllm_dfloat.dfloat11.unit import Unit
from vllm_dfloat.errors import DeviceError, FormatError


class DeviceCoder:
    """Encodes pieces of units on a GPU, or on a CPU in Triton's interpreter; any thread may call it.

    Raises:
        DeviceError: Triton is not installed, or the device has too little memory.
    """

    def __init__(self, device: torch.device, tiles_per_program: int = 0) -> None:
        """
        Args:
            device: where the kernels run.
            tiles_per_program: a launch parameter of the encode kernels; 0 for the value in kernels/configs.py.
        """
        self._device = device
        with needing_triton(device, ", or compress with --device cpu"):
            from vllm_dfloat.kernels import dfloat11_encode, packed_encode
        self._packed, self._kernels = packed_encode, dfloat11_encode
        self._tiles = tiles_per_program
        self._cached = _Cached()

    def count(self, weights: U16Array) -> I64Array:
        whole = weights.size // TILE_WEIGHTS * TILE_WEIGHTS
        with self._working():
            counts = torch.zeros(256, dtype=torch.int64, device=self._device)
            self._packed.count_exponents(self._upload(weights[:whole]), counts)
            found: I64Array = counts.cpu().numpy()
        rest = weights[whole:] >> SYMBOL_SHIFT & 0xFF
        return found + np.bincount(rest, minlength=256)

    def write(self, weights: U16Array, book: Book, bit: int, out: Codes64) -> int:
        kernels, size = self._kernels, weights.size
        with self._working():
            codes, lengths = self._tables_of(book)
            flat = self._upload(weights, kernels.LANE_WEIGHTS)
            lane_bits = self._empty(flat.numel() // kernels.LANE_WEIGHTS, torch.int32)
            kernels.measure(flat, size, lengths, lane_bits, self._tiles)
            ends = lane_bits.cumsum(0, dtype=torch.int64) + bit
            end = int(ends[-1])
            window, windows, blocks = bit // WINDOW_BITS, end // WINDOW_BITS + 1, end // BLOCK_BITS
            words = torch.zeros(2 * windows, dtype=torch.int32, device=self._device)
            first_bits = self._empty(windows, torch.uint8)
            begins = self._empty(blocks + 1, torch.int64)
            starts = ends - lane_bits
            kernels.write(
                flat, size, codes, lengths, starts, words, first_bits, begins, self._tiles
            )
            out.words[window:windows] |= words[2 * window :].cpu().numpy().view(np.uint64)
            out.first_bits[window + 1 : windows] = first_bits[window + 1 :].cpu().numpy()
            out.begins[1 : blocks + 1] = begins[1:].cpu().numpy()
        return end

    def sign_mantissa(self, weights: U16Array) -> U8Array:
        with self._working():
            out = self._empty(weights.size, torch.uint8)
            self._kernels.split(self._upload(weights), out)
            split: U8Array = out.cpu().numpy()
        return split

    def equals(self, unit: Unit, start: int, weights: U16Array) -> bool:
        with self._working():
            decoded = decode_unit(unit, self._device, start, start + weights.size)
            return torch.equal(decoded.view(torch.int16), self._upload(weights))

    def _empty(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=self._device)

    def _upload(self, weights: U16Array, multiple: int = 1) -> torch.Tensor:
        """Return the bits on the device, int16, with unset elements up to the next multiple."""
        flat = self._empty(-(-weights.size // multiple) * multiple, torch.int16)
        flat[: weights.size] = torch.from_numpy(weights.view(np.int16))
        return flat

    def _tables_of(self, book: Book) -> tuple[torch.Tensor, torch.Tensor]:
        cached = self._cached
        if cached.tables is None or cached.book is not book:
            arrays = _left_aligned(book), book.lengths
            codes, lengths = (torch.from_numpy(array).to(self._device) for array in arrays)
            cached.book, cached.tables = book, (codes, lengths)
        return cached.tables

    @contextmanager
    def _working(self) -> Iterator[None]:
        try:
            # Triton launches on the current device; -1 changes nothing.
            with torch.cuda.device(self._device if self._device.type == "cuda" else -1):
                yield
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"{self._device}: has too little free memory to compress on ({str(error).splitlines()[0]}). "
                "End what else uses it, or compress with --device cpu."
            ) from error


class _Cached(threading.local):
    """The tables of the code book that this thread used last."""

    book: Book | None = None
    tables: tuple[torch.Tensor, torch.Tensor] | None = None


def check_coder(coder: Coder, where: str) -> None:
    """Encode a few weights and compare the bytes with the CPU coder's; compiles every kernel before threads use it.

    Raises:
        DeviceError: a byte differs.
    """
    weights = [np.arange(1 << 14, dtype=np.uint16) * np.uint16(7), np.full(4099, 0x3C12, np.uint16)]
    weights[0] &= np.uint16(0xBFFF)  # exponents below 128
    expected = encode_unit(weights, where)
    wrong, is_equal = list(expected), False  # also if wrong numbers make the host code raise
    with suppress(ArithmeticError, LookupError, ValueError, FormatError):
        made = encode_unit(weights, where, coder)
        wrong = [field for field in expected if not np.array_equal(made[field], expected[field])]
        is_equal = coder.equals(as_unit(expected, where), 0, np.concatenate(weights))
    if wrong or not is_equal:
        raise DeviceError(
            f"{where}: encodes a test pattern with a wrong {', '.join(wrong) or 'comparison'}. Its driver, Triton or "
            "memory cannot be trusted; compress with --device cpu."
        )


def coder_of(name: str) -> DeviceCoder | None:
    """Return the coder for a GPU: "cuda", "cuda:N", or "auto", which gives None without a usable GPU.

    Raises:
        DeviceError: there is no such GPU, it is too old, or it encodes wrongly.
    """
    count = torch.cuda.device_count()
    if name == "auto":
        is_usable = count > 0 and torch.cuda.get_device_capability(0) >= MIN_CAPABILITY
        return _checked(torch.device("cuda", 0)) if is_usable else None
    index = int(name.partition(":")[2] or 0)
    if index >= count:
        raise DeviceError(
            f"{name}: torch {torch.__version__} sees {count} GPUs, counted from 0. Choose one of them, install a "
            "torch for the GPU's driver, or compress with --device cpu."
        )
    device = torch.device("cuda", index)
    check_device(device)
    return _checked(device)


def _checked(device: torch.device) -> DeviceCoder:
    coder = DeviceCoder(device)
    check_coder(coder, str(device))
    return coder


def _left_aligned(book: Book) -> U32Array:
    shift = (32 - book.lengths.astype(np.uint64)) % 64
    return (book.values.astype(np.uint64) << shift).astype(np.uint32)
