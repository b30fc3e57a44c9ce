"""The exceptions of this package.

Every message says in this order: where, what was found, what was expected, what to do.
"""

from typing import Any

MAX_MESSAGE = 1000  # characters; names and numbers come from files, and may be of any length
_MAX_VALUE = 60


class DFloatError(Exception):
    """Base of every error this package raises on purpose; the CLI prints it without a traceback.

    Its text is one line of at most MAX_MESSAGE printable characters, whatever a file's names hold.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


class FormatError(DFloatError):
    """Stored bytes contradict the format: truncated, corrupt or not DFloat11 at all."""


class ChangedError(FormatError):
    """A file was changed while it was read."""


class UnsupportedError(DFloatError):
    """The input is well formed, but this package does not handle it (legacy layout, wrong dtype)."""


class DeviceError(DFloatError):
    """The device or its software cannot run the kernel (too old a GPU, no Triton)."""


def one_line(text: str, limit: int = MAX_MESSAGE) -> str:
    """Return `text` in `limit` characters at most, unprintable ones escaped (line ends, terminal codes, surrogates).

    It is cut in the middle: the end of a message says what was wrong.
    """
    return _cut(escaped(_cut(text, limit)), limit)


def escaped(text: str) -> str:
    """Return `text` with unprintable characters escaped, in full."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _cut(text: str, limit: int) -> str:
    half = (limit - 3) // 2
    return text if len(text) <= limit else f"{text[:half]}...{text[-half:]}"


def shown(value: Any) -> str:
    """Return a short form of anything that JSON can hold, for messages; never walks through a deep or huge value."""
    if isinstance(value, dict | list):
        kind = "an object" if isinstance(value, dict) else "a list"
        simple = all(isinstance(item, int | float | str | None) for item in list(value)[:4])
        if len(value) > 4 or not simple or isinstance(value, dict):
            return f"{kind} of {len(value)}"
        return f"[{', '.join(shown(item) for item in value)}]"
    return repr(value) if not isinstance(value, str) else repr(_cut(value, _MAX_VALUE))
