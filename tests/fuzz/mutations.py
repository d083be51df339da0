"""Changes to bytes and to JSON, drawn with a fixed seed, and the bounds that every reader must keep."""

import random
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SLOWEST = 5.0  # seconds that one file may take on a busy machine: far above any honest time, far below a hang
MOST_MEMORY = 1 << 31  # bytes that all files together may add to the process, sanitizers' share included


@contextmanager
def in_time() -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < SLOWEST


@contextmanager
def in_memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_MEMORY


def mutate(data: bytes, draw: random.Random) -> bytes:
    """One to four changes of one kind each."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(out)) if out else 0
        length = draw.choice((1, 2, 4, 8, 33))
        kind = draw.randrange(7)
        if kind == 0 and out:
            out[place] ^= 1 << draw.randrange(8)
        elif kind == 1 and out:
            out[place] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
        elif kind == 2:
            out[place : place + length] = b""
        elif kind == 3:
            out[place:place] = out[place : place + length]
        elif kind == 4:
            out[place:place] = draw.randbytes(length)
        elif kind == 5:
            del out[place:]
        else:
            out[place : place + length] = draw.choice((b"\xff", b"\x00")) * length
    return bytes(out)


def mutate_json(value: Any, draw: random.Random) -> Any:
    """The document with one value somewhere in it replaced."""
    odd = (None, -1, 0, 1 << 31, 1 << 70, 1.5, float("1e300"), "", "int6", "x" * 300, [], {}, [[]], True)
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(sorted(value))
        if draw.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: mutate_json(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.9:
        place = draw.randrange(len(value))
        if draw.random() < 0.1:
            return value[:place] + value[place + 1 :]
        return [*value[:place], mutate_json(value[place], draw), *value[place + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and draw.random() < 0.5:
        return value + draw.choice((-1, 1, 8, 1000, 1 << 20))
    return draw.choice(odd)
