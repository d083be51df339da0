"""Out of memory on a GPU, as an error that a user can mend: the stage, what is in use, and what to set lower."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from model.errors import DeviceMemoryError

_NOTHING_SMALLER = "no setting of this stage needs less; free what other processes hold there, or take a larger GPU"


@contextmanager
def memory_for(
    stage: str, device: torch.device | str, advice: Callable[[], str] | None = None, *, detail: str = ""
) -> Iterator[None]:
    """Raises DeviceMemoryError where the block runs out of the device's memory.

    Its text names the `stage` (such as "in a training step") with `detail`, and what `advice()` says: a flag with a
    value, as from `lower`; "" where nothing can be set lower. Stages may be nested; the innermost one is named.
    """
    try:
        yield
    except RuntimeError as error:
        cause = _memory_error(error)
        if cause is None:
            raise
        place = f"out of memory on {device} {stage}" + (f" {detail}" if detail else "")
        what = (advice() if advice else "") or _NOTHING_SMALLER
        reason = next(iter(str(cause).splitlines()), type(cause).__name__)
        raise DeviceMemoryError(f"{place}; {what}{_in_use(torch.device(device))} ({reason})") from error


def lower(name: str, value: int, multiple: int = 1) -> str:
    """Advice to halve the field `name`, to a multiple of `multiple`; "" where that leaves nothing."""
    smaller = value // 2 // multiple * multiple
    return f"--{name.replace('_', '-')} {smaller} in place of {value} needs less" if smaller else ""


def _memory_error(error: BaseException | None) -> BaseException | None:
    """The torch.OutOfMemoryError that `error` is or follows from: a CUDA graph's end fails where its recording did."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__ or error.__context__
    return error


def _in_use(device: torch.device) -> str:
    """What this process holds there and what is free, for a text; nothing for a CPU."""
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_allocated(device)
    return f"; {held / 2**30:.2f} GiB in use here, {free / 2**30:.2f} of {total / 2**30:.2f} GiB free"
