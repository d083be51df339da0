"""One CUDA graph for each of a few step sizes, with a shared memory pool.

A step of a few small documents is a thousand short kernels: launched one by one they take the host longer than the GPU
needs. What changes from step to step goes through one small tensor, `control`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from model.compilations import compiled_together


class StepGraphs:
    """Graphs of `step(size, control) -> scores` for the given sizes; construction warms up and records them.

    First every kernel is compiled, in steps that leave uncompiled ones out: what a step writes may then be anything.
    """

    def __init__(self, step: Callable[[int, Tensor], Tensor], controls: list[Tensor], sizes: np.ndarray) -> None:
        self._sizes = sizes
        self._control = controls[0].cuda()
        self._graphs: list[torch.cuda.CUDAGraph] = [torch.cuda.CUDAGraph() for _ in sizes]
        self._scores: list[Tensor] = [torch.empty(0)] * len(sizes)
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        with compiled_together(self._control.device):
            for size, control in zip(sizes, controls, strict=True):
                step(int(size), self._control.copy_(control))
        # The largest first: the others fit into the memory that it leaves in the pool.
        for i in reversed(range(len(sizes))):
            self._control.copy_(controls[i])
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step(int(sizes[i]), self._control)  # loads kernels, sets up libraries
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.empty_cache()
            with torch.cuda.graph(self._graphs[i], pool=pool):
                self._scores[i] = step(int(sizes[i]), self._control)

    def run(self, size: int, control: Tensor) -> Tensor:
        """Replays the smallest graph that holds `size`; control [3, slots] on the host. Scores, a copy."""
        i = int(np.searchsorted(self._sizes, size))
        self._control.copy_(control.pin_memory(), non_blocking=True)
        self._graphs[i].replay()
        return self._scores[i].clone()
