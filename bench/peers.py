"""Other people's code: installed packages, and files under PGOLF_PEER_DIR, none of which is copied here."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any


class Absent(Exception):
    """A peer that cannot run here; the message says why."""


def peer_file(path: str) -> Path:
    """A file under PGOLF_PEER_DIR: somebody's checkout of the public systems. Raises Absent."""
    folder = os.environ.get("PGOLF_PEER_DIR")
    if not folder:
        raise Absent("PGOLF_PEER_DIR is not set")
    file = Path(folder) / path
    if not file.is_file():
        raise Absent(f"no {path} in PGOLF_PEER_DIR")
    return file


def peer_module(path: str) -> types.ModuleType:
    """A Python file under PGOLF_PEER_DIR, imported once. Raises Absent where it or what it imports is not there."""
    file = peer_file(path)
    name = "peer_" + "_".join(Path(path).with_suffix("").parts)
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        del sys.modules[name]
        raise Absent(f"{path}: {error}") from error
    return module


def peer_package(name: str) -> types.ModuleType:
    """An installed package, or Absent."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"{name} is not installed") from error


@functools.cache
def script_1530() -> Any:
    """The script of pull request 1530. It imports FlashAttention 3 first: where that is missing, ours stands in."""
    from pgolf_kernels import varlen_attention

    def attention(q: Any, k: Any, v: Any, *, cu_seqlens_q: Any, max_seqlen_q: int, **options: Any) -> Any:
        return varlen_attention(q, k, v, cu_seqlens_q, max_seqlen_q)

    try:
        importlib.import_module("flash_attn_interface")
    except ImportError:
        stand_in = types.ModuleType("flash_attn_interface")
        vars(stand_in).update(flash_attn_func=None, flash_attn_varlen_func=attention)
        sys.modules["flash_attn_interface"] = stand_in
    return peer_module("pr1530/train_gpt.py")
