"""What GPU tests of several ops share."""

from collections.abc import Callable
from typing import Any

import torch


def assert_returns_at_once(call: Callable[[], Any]) -> None:
    """`call`, which has run before, leaves its work to the GPU and does not wait for it."""
    torch.cuda.synchronize()
    torch.cuda._sleep(int(2e9))  # about a second
    done = torch.cuda.Event()
    call()
    done.record()
    assert not done.query()
    torch.cuda.synchronize()


def replayed(call: Callable[[], Any]) -> Any:
    """What `call` gives, recorded as a CUDA graph and replayed."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    torch.cuda.synchronize()  # the graph ends here
    return captured
