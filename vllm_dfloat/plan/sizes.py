"""Entries of a config: sizes, numbers, strings, flags and lists; an entry of another kind is an error."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_dfloat.errors import FormatError, shown

# No size in a config is as large; a larger one is a mistake, and would take forever.
MAX_SIZE = 1 << 32


@dataclass(frozen=True)
class Sizes:
    """A part of a config, such as its vision_config, and its place for messages."""

    where: str
    entries: Mapping[str, Any]

    def size(self, name: str, default: int | None = None) -> int:
        """Return entry `name`.

        Raises:
            FormatError: it is missing without a default, or anything but an integer from 1 to MAX_SIZE.
        """
        value = self.entries.get(name)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 0 < value <= MAX_SIZE:
            raise FormatError(
                f"{self.where}: {name} is {shown(value)}; expected an integer from 1 to {MAX_SIZE}."
            )
        return value

    def widest(self, name: str, default: int) -> int:
        """Return entry `name`, or the largest where it is a list with a size per layer; `default` if it is missing.

        Raises:
            FormatError: an entry, or one of the list, is no size.
        """
        value = self.entries.get(name)
        if not isinstance(value, list) or not value:
            return self.size(name, default)
        sizes = {f"{name}[{index}]": one for index, one in enumerate(value)}
        return max(Sizes(self.where, sizes).size(one) for one in sizes)

    def count(self, name: str, default: int = 0) -> int:
        """Return entry `name`, which may be 0, or false for the same; `default` if it is missing.

        Raises:
            FormatError: anything but an integer from 0 to MAX_SIZE.
        """
        value = self.entries.get(name)
        return (
            0 if value is False or (type(value) is int and value == 0) else self.size(name, default)
        )

    def flag(self, name: str, default: bool = False) -> bool:
        """Return entry `name`, true or false; `default` if it is missing.

        Raises:
            FormatError: anything but true, false, 1 and 0.
        """
        value = self.entries.get(name)
        if value is None:
            return default
        if type(value) not in (bool, int) or value not in (0, 1):
            raise FormatError(f"{self.where}: {name} is {shown(value)}; expected true or false.")
        return bool(value)

    def text(self, name: str, default: str = "") -> str:
        """Return entry `name`, a string; `default` if it is missing.

        Raises:
            FormatError: anything else.
        """
        value = self.entries.get(name)
        if value is not None and not isinstance(value, str):
            raise FormatError(f"{self.where}: {name} is {shown(value)}; expected a string.")
        return default if value is None else value

    def integers(self, name: str, default: Sequence[int] = ()) -> Sequence[int]:
        """Return entry `name`, a list of integers; `default` if it is missing.

        Raises:
            FormatError: anything else.
        """
        value = self.entries.get(name)
        if value is None:
            return default
        if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
            raise FormatError(
                f"{self.where}: {name} is {shown(value)}; expected a list of integers."
            )
        return value

    def ratio(self, name: str, default: float) -> float:
        """Return entry `name`, a positive number.

        Raises:
            FormatError: anything else.
        """
        value = self.entries.get(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not 0 < value <= MAX_SIZE:
            raise FormatError(
                f"{self.where}: {name} is {shown(value)}; expected a positive number."
            )
        return float(value)

    def part(self, name: str) -> "Sizes":
        """Return entry `name`, an object; an empty one if it is missing.

        Raises:
            FormatError: it is something else.
        """
        value = self.entries.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise FormatError(f"{self.where}: {name} is {shown(value)}; expected an object.")
        return Sizes(f"{self.where}: {name}", value or {})
