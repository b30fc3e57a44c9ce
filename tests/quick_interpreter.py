"""Makes Triton's interpreter replace the functions of triton.language once a launch.

It does so again in every call of a function within a kernel, though they are replaced already: a fifth of the time.
"""

import triton.language as tl
from triton.runtime import interpreter

_replace = interpreter._patch_lang
_replaced: set[int] = (
    set()
)  # ids of the modules whose functions the launch in progress has replaced


def _replace_once(fn):  # type: ignore[no-untyped-def]
    modules = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
    if modules <= _replaced:
        return interpreter._LangPatchScope()  # restores nothing
    scope = _replace(fn)
    if not _replaced:  # the kernel itself: its functions' scopes are not restored
        restore = scope.restore

        def restore_all() -> None:
            _replaced.clear()
            restore()

        _replaced.update(modules)
        scope.restore = restore_all
    return scope


def install() -> None:
    """Use it in this process, with a Triton that keeps what it replaces."""
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _replace_once
