"""Running an evaluation in a fresh process in which certain files do not exist.

On Linux with user namespaces the process gets a mount namespace of its own, in which every file to be hidden is covered
by an empty one: native code that opens it by whatever name finds nothing. Elsewhere the files stay, and only opens by
Python code are seen, through an audit hook; `Isolation.hidden` says which it was.

This module imports nothing beyond the standard library: a namespace can only be left before threads exist.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

_NEW_USER, _NEW_MOUNTS = 0x10000000, 0x00020000
_BIND, _RECURSIVE, _PRIVATE = 4096, 16384, 1 << 18


@dataclass
class Isolation:
    """`hidden`: the files are gone for this process. `opened`: those that Python code tried to open all the same."""

    hidden: bool
    reason: str
    opened: list[str] = field(default_factory=list)


def isolate(paths: Sequence[str]) -> Isolation:
    """Hides the files from this process and watches for attempts to open them. Call it before starting threads."""
    real = {os.path.realpath(path) for path in paths}
    reason = _hide(sorted(real))
    isolation = Isolation(hidden=reason is None, reason=reason or "covered in a mount namespace of its own")

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if path in real:
                isolation.opened.append(path)

    sys.addaudithook(watch)
    return isolation


def _hide(paths: list[str]) -> str | None:
    """None when the files are hidden, otherwise why they are not."""
    if sys.platform != "linux":
        return f"no mount namespaces on {sys.platform}"
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEW_USER | _NEW_MOUNTS):
        return f"no user namespaces here ({os.strerror(ctypes.get_errno())})"
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    except OSError as error:
        return f"no mapping of users here ({error.strerror})"
    if libc.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None):
        return f"mounts cannot be made private ({os.strerror(ctypes.get_errno())})"
    for path in paths:
        if libc.mount(b"/dev/null", os.fsencode(path), None, _BIND, None):
            return f"{path} cannot be covered ({os.strerror(ctypes.get_errno())})"
    return None


def main() -> None:
    """`python -m model.isolation REQUEST`: hides the request's files, then calls its module:function with both."""
    with open(sys.argv[1]) as file:
        request = json.load(file)
    isolation = isolate(request["hide"])
    module, _, name = request["call"].partition(":")
    getattr(importlib.import_module(module), name)(request, isolation)


if __name__ == "__main__":
    main()
