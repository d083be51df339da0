"""Running something in a fresh process in which certain files do not exist, and noting what else it reads.

On Linux with user namespaces the process gets a mount namespace of its own, in which every file or folder to be hidden
is covered by an empty one, and a network of its own, which leads nowhere: native code that opens such a file by
whatever name finds nothing. Elsewhere the files stay, and only opens by Python code are seen, through an audit hook,
which proves nothing about native code; `Isolation.hidden` says which it was. Other files are noted through that hook.

This module imports nothing beyond the standard library: a namespace can only be entered before threads exist.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import runpy
import site
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

_NEW_USER, _NEW_MOUNTS, _NEW_NETWORK = 0x10000000, 0x00020000, 0x40000000
_BIND, _RECURSIVE, _PRIVATE = 4096, 16384, 1 << 18
_SYSTEM = ("/proc", "/sys", "/etc", "/usr", "/lib", "/lib64", "/opt/nvidia")


@dataclass
class Isolation:
    """`hidden`: the files are gone for this process. `opened`: those that Python code tried to open all the same.

    `read`: other files that Python code opened for reading. `own`: files and folders that it made for itself.
    """

    hidden: bool
    reason: str
    opened: list[str] = field(default_factory=list)
    read: set[str] = field(default_factory=set)
    own: set[str] = field(default_factory=set)

    def other_files(self, known: Sequence[str]) -> dict[str, int]:
        """Bytes of the files that were read, and of the code that was imported, from outside Python and `known`.

        Those are what a scorer has to bring along. `known`: files and folders, such as the data set's.
        """
        installed = {sys.prefix, sys.base_prefix, sys.exec_prefix, *sysconfig.get_paths().values(), *_SYSTEM}
        installed |= {*site.getsitepackages(), site.getusersitepackages()}
        apart = tuple(os.path.realpath(path) for path in (*installed, *known, *self.own))
        found = {}
        for path in sorted(self.read | _of_modules("__file__")):
            if not _lies_in(path, apart) and not path.endswith(".pyc") and os.path.isfile(path):
                found[path] = os.path.getsize(path)
        return found

    def written_since(self, started: float, folder: Path) -> list[str]:
        """Files that were read and have been written after `started` (seconds since the epoch) by another process.

        Those in `folder` are the caller's. By the time of the last change of any kind, which nobody can set.
        """
        apart = (*_SYSTEM, *(os.path.realpath(path) for path in (str(folder), *self.own)))
        candidates = sorted(path for path in self.read - _of_modules("__cached__") if not _lies_in(path, apart))
        return [path for path in candidates if os.path.isfile(path) and os.stat(path).st_ctime > started]


def _of_modules(attribute: str) -> set[str]:
    """The real paths that this attribute of the imported modules has."""
    paths = {getattr(module, attribute, None) for module in list(sys.modules.values())}
    return {os.path.realpath(path) for path in paths if isinstance(path, str)}


def _lies_in(path: str, places: Sequence[str]) -> bool:
    return any(path == place or path.startswith(place.rstrip(os.sep) + os.sep) for place in places)


def environment() -> dict[str, str]:
    """The environment variables of a fresh process that finds the modules that this one finds."""
    places = [str(Path(__file__).parents[1]), *(place for place in sys.path if place)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places)}


def isolate(paths: Sequence[str]) -> Isolation:
    """Hides files and folders from this process and watches what it opens. Call it before starting threads."""
    real = {os.path.realpath(path) for path in paths}
    folders = tuple(path + os.sep for path in real if os.path.isdir(path))
    reason = _hide(sorted(real))
    covered = "covered in a mount namespace of its own, without a network"
    isolation = Isolation(hidden=reason is None, reason=reason or covered)

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event.startswith("tempfile.mk"):
            isolation.own.add(os.path.realpath(str(arguments[0])))
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path, flags = os.path.realpath(os.fsdecode(arguments[0])), arguments[2]
            if path in real or path.startswith(folders):
                isolation.opened.append(path)
            elif isinstance(flags, int) and flags & (os.O_TRUNC | os.O_EXCL) and path not in isolation.read:
                isolation.own.add(path)  # nothing from before is left in it
            elif isinstance(flags, int) and flags & os.O_ACCMODE != os.O_WRONLY:
                isolation.read.add(path)
        elif event == "os.rename":
            isolation.own.discard(os.path.realpath(str(arguments[1])))

    sys.addaudithook(watch)
    return isolation


def _hide(paths: list[str]) -> str | None:
    """None when the files are hidden, otherwise why they are not."""
    if sys.platform != "linux":
        return f"no mount namespaces on {sys.platform}"
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEW_USER | _NEW_MOUNTS | _NEW_NETWORK):
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
        kind = (b"none", b"tmpfs", 0) if os.path.isdir(path) else (b"/dev/null", None, _BIND)
        source, system, flags = kind
        if libc.mount(source, os.fsencode(path), system, flags, None):
            return f"{path} cannot be covered ({os.strerror(ctypes.get_errno())})"
    return None


def _run_script(request: dict[str, object], isolation: Isolation) -> None:
    """Runs the request's `script` with its `arguments`, as from the command line, and writes `answer.json`."""
    script, folder = str(request["script"]), str(request["folder"])
    sys.argv = [script, *request["arguments"]]  # type: ignore[misc]
    sys.path[0] = os.path.dirname(script)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    known = [folder, os.path.dirname(script), os.path.realpath(__file__)]
    answer = {"opened": isolation.opened, "other_files": isolation.other_files(known)}
    (Path(folder) / "answer.json").write_text(json.dumps(answer))


def main() -> None:
    """`python -m model.isolation REQUEST` hides the request's files, then calls its module:function with both.

    `python .../isolation.py REQUEST` runs the request's script instead, with nothing of this project imported.
    """
    with open(sys.argv[1]) as file:
        request = json.load(file)
    isolation = isolate(request["hide"])
    if "script" in request:
        _run_script(request, isolation)
        return
    module, _, name = request["call"].partition(":")
    getattr(importlib.import_module(module), name)(request, isolation)


if __name__ == "__main__":
    main()
