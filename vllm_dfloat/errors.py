"""The exceptions of this package.

Every message is one sentence group in the order: where, what was found, what was expected, what to do.
"""


class DFloatError(Exception):
    """Base of every error this package raises on purpose; the CLI prints it without a traceback."""


class FormatError(DFloatError):
    """Stored bytes contradict the format: truncated, corrupt or not DFloat11 at all."""


class UnsupportedError(DFloatError):
    """The input is well formed, but this package does not handle it (legacy layout, wrong dtype)."""


class DeviceError(DFloatError):
    """The device or its software cannot run the kernel (too old a GPU, no Triton)."""
