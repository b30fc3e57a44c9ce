"""The options that a user can give, and the checks of their values."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any

from vllm_dfloat.checkpoint.folder import CONFIG_KEY
from vllm_dfloat.errors import UnsupportedError
from vllm_dfloat.integration.seam.names import METHOD
from vllm_dfloat.plan.byte_sizes import parse_size

LAYOUTS = ("packed", "fast", "dfloat11")  # their functions are in layouts.py
AUTO = "auto"  # as a layout: fast for some layers, packed for the others
FUSED_EXACT = "fused-exact"
MODES = ("exact", "fused", FUSED_EXACT)
GRANULARITIES = ("auto", "layer", "block")
# Values of options that only these layouts have kernels for.
NEEDS = (
    ("mode", "fused", ("packed", "fast", AUTO)),
    ("mode", FUSED_EXACT, ("fast", AUTO)),
    ("granularity", "block", ("packed", "fast", AUTO)),
)
# Where options are given, for messages. vLLM does not tell which of the two the first are from.
IN_CONFIG = "config.json or --hf-overrides: quantization_config"
ON_COMMAND_LINE = f"--additional-config: {METHOD}"
SLABS = ("auto", "off")  # or a number of bytes, or a size such as "64MiB"


@dataclass(frozen=True)
class Options:
    """The options of one run.

    Attributes:
        ignore: layers left in BF16: names, names with * and ?, or "re:" and a regular expression, as in vLLM's
            online quantization. A fused layer (qkv_proj) may be given by its own name or by the names of all its parts.
        layout: how compressed weights are held: "packed", the smallest; "fast", larger by 1.2 bits per weight and read
            with fewer instructions; or "dfloat11", the official layout; or "auto": fast for as many layers as leave
            room for `kv_tokens`, packed for the others.
        kv_tokens: tokens of KV cache that layout "auto" leaves room for; None for one request of --max-model-len.
        mode: "exact" gives the bits of BF16 vLLM; "fused" multiplies small batches directly by compressed weights;
            "fused-exact" does so only where it was proven, after loading, to give the bits of BF16 vLLM.
        granularity: decode one "layer" per launch, or all linear layers of a transformer "block"; "auto" takes the one
            that was measured to be faster for groups of that size on that GPU (kernels/configs.py).
        slab: an LM head is decoded and multiplied in slabs of at most so many bytes of BF16, where that gives the same
            bits; "auto" takes as many as the scratch has for other layers, or those of kernels/configs.py if that is
            more; "off" holds scratch for the whole head.
    """

    ignore: tuple[str, ...] = ()
    layout: str = "packed"
    mode: str = "exact"
    granularity: str = "auto"
    kv_tokens: int | None = None
    slab: str | int = "auto"

    def updated(self, given: Mapping[str, Any], where: str) -> "Options":
        """Return a copy of these options with the entries of `given` replaced.

        Args:
            where: the origin of `given`, for messages.

        Raises:
            UnsupportedError: an unknown option, a wrong value, or values that exclude each other.
        """
        options = self.replaced(given, where)
        earlier = {  # of given options, those that are not of `given`
            name: " of quantization_config"
            for name, value in asdict(self).items()
            if name not in given and value != getattr(Options, name)
        }
        _refuse_contradictions(options, earlier, where)
        return options

    def replaced(self, given: Mapping[str, Any], where: str) -> "Options":
        """Do what `updated` does, but let values exclude each other: others that are still to come may change them."""
        merged = asdict(self)
        for name, value in given.items():
            if name not in merged:
                raise UnsupportedError(
                    f"{where}: unknown option {name!r}; expected {', '.join(merged)}. Correct or remove it."
                )
            merged[name] = value
        return Options(
            ignore=_patterns(merged["ignore"], where),
            layout=_one_of((*LAYOUTS, AUTO), merged["layout"], f"{where}: layout"),
            mode=_one_of(MODES, merged["mode"], f"{where}: mode"),
            granularity=_one_of(GRANULARITIES, merged["granularity"], f"{where}: granularity"),
            kv_tokens=_count(merged["kv_tokens"], f"{where}: kv_tokens"),
            slab=_slab(merged["slab"], f"{where}: slab"),
        )


def _refuse_contradictions(options: Options, earlier: Mapping[str, str], where: str) -> None:
    """Refuse options that need another layout.

    Args:
        options: all of them.
        earlier: name -> where it was given, as the end of a phrase, for those that are not of `where`.
        where: the origin of the others.

    Raises:
        UnsupportedError: two options exclude each other.
    """
    held = f"layout {options.layout!r}{earlier.get('layout', '')}"
    for name, value, layouts in NEEDS:
        if options.layout not in layouts and getattr(options, name) == value:
            of = earlier.get(name, "")
            raise UnsupportedError(
                f"{where}: {name} {value!r}{of} with {held}; it needs layout "
                f"{' or '.join(map(repr, layouts))}. Set layout to one of these, or leave {name} out{of}."
            )
    if options.kv_tokens is not None and options.layout != AUTO:
        of = earlier.get("kv_tokens", "")
        raise UnsupportedError(
            f"{where}: kv_tokens {options.kv_tokens}{of} with {held}; it needs layout {AUTO!r}. "
            f"Set layout to {AUTO!r}, or leave kv_tokens out{of}."
        )


def of_config(config: Mapping[str, Any]) -> Options:
    """Return the options of a config.json's `quantization_config`, on top of which those of the command line come.

    Raises:
        UnsupportedError: as `Options.replaced`.
    """
    known = ("quant_method", CONFIG_KEY)
    given = {name: value for name, value in config.items() if name not in known}
    return Options().replaced(given, IN_CONFIG)


def with_command_line(options: Options, config: Any) -> Options:
    """Return the options of config.json with those of a VllmConfig's --additional-config, which win.

    Raises:
        UnsupportedError: as `updated`, or what was given is no object.
    """
    given = _on_command_line(config)
    if not isinstance(given, Mapping):
        raise UnsupportedError(f"{ON_COMMAND_LINE} is {_as_given(given)}; expected an object.")
    if not given:
        _refuse_contradictions(options, {}, IN_CONFIG)
    return options.updated(given, ON_COMMAND_LINE)


def origin_of(name: str, config: Any) -> str:
    """Return where an option was given, for messages, if the command line is that of this VllmConfig."""
    return ON_COMMAND_LINE if name in _on_command_line(config) else IN_CONFIG


def _on_command_line(config: Any) -> Any:
    extra = getattr(config, "additional_config", None)
    return extra.get(METHOD, {}) if isinstance(extra, Mapping) else {}


def misplaced(extra: Mapping[Any, Any], section: str) -> str:
    """Return a line on entries of --additional-config that were meant for `section` and are not in it, or nothing."""
    own = Options.__dataclass_fields__
    names = sorted(
        str(name) for name in extra if name in own or (name != section and _is_like(str(name)))
    )
    if not names:
        return ""
    inside = ", ".join(f'"{name}": ...' for name in names if name in own) or "..."
    return (
        f"--additional-config: {', '.join(map(repr, names))} has no effect there; give "
        f'{{"{section}": {{{inside}}}}}'
    )


def _is_like(name: str) -> bool:
    """Return whether a name is one of the format's, in capitals or with a few letters wrong."""
    return bool(get_close_matches(name.lower(), ("dfloat11", "df11"), cutoff=0.8))


def _as_given(value: Any) -> str:
    """Return a value for messages: what is no text as JSON, in which options are written."""
    return repr(value) if isinstance(value, str) else json.dumps(value, default=repr)


def _one_of(choices: tuple[str, ...], value: Any, where: str) -> str:
    if value not in choices:
        raise UnsupportedError(
            f"{where}: {_as_given(value)}; expected one of {', '.join(choices)}."
        )
    return str(value)


def _count(value: Any, where: str) -> int | None:
    if value is not None and (type(value) is not int or value < 1):
        raise UnsupportedError(
            f"{where}: {_as_given(value)}; expected a number of tokens, at least 1."
        )
    return value


def _slab(value: Any, where: str) -> str | int:
    if type(value) is int and value > 0:
        return value
    if value in SLABS:
        return str(value)
    with suppress(UnsupportedError):
        if isinstance(value, str) and (size := parse_size(value, where)):
            return size
    raise UnsupportedError(
        f"{where}: {_as_given(value)}; expected one of {', '.join(SLABS)}, a positive number of bytes, or as '64MiB'."
    )


def _patterns(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(entry, str) for entry in value):
        raise UnsupportedError(
            f"{where}: ignore is {_as_given(value)}; expected a list of layer names or 're:' patterns."
        )
    for entry in value:
        try:
            re.compile(entry.removeprefix("re:") if entry.startswith("re:") else "")
        except re.error as error:
            raise UnsupportedError(
                f"{where}: ignore has {entry!r}, which is no regular expression ({error})."
            ) from error
    return tuple(value)
