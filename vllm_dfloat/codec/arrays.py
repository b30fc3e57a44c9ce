"""The types of arrays that this package handles, by the dtype of their elements."""

from typing import Any

import numpy as np
import numpy.typing as npt

U8Array = npt.NDArray[np.uint8]
U16Array = npt.NDArray[np.uint16]
U32Array = npt.NDArray[np.uint32]
U64Array = npt.NDArray[np.uint64]
I32Array = npt.NDArray[np.int32]
I64Array = npt.NDArray[np.int64]
Bits = npt.NDArray[Any]  # the bits of a tensor of any dtype
