"""One micro-step: the loss of a batch and its gradients, added to the parameters' `.grad`.

On a GPU the forward and backward are recorded once as a CUDA graph for every combination of options and of length of
`cu_seqlens` (loaders pad it to a few sizes), then replayed on inputs copied into place: some 2,000 launches cost the
host one. All graphs share one memory pool, since only one runs at a time. Elsewhere the same code runs eagerly.

Given up: torch.compile. Everything between the matrix products is a kernel of this package already, and recording takes
half a second where compiling takes minutes.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.data.loaders import Batch
from model.gpt import GPT

EAGER_RUNS = 2  # before recording: libraries allocate workspaces and Triton compiles on a first run


@dataclass
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    targets: Tensor
    cu_seqlens: Tensor | None
    loss: Tensor


class MicroStep:
    """Calls of one model. `weight` multiplies the loss before its backward (1 / number of micro-steps); `max_seqlen`
    bounds every document's length; `record=False` runs eagerly on a GPU too; `fp8`: the MLPs multiply in FP8.

    Recorded gradients stay where they were at the first call: zero them in place.
    """

    def __init__(self, model: GPT, *, weight: float, max_seqlen: int, record: bool = True, fp8: bool = False) -> None:
        self.model, self.weight, self.max_seqlen, self.record, self.fp8 = model, weight, max_seqlen, record, fp8
        self._recordings: dict[Hashable, _Recording] = {}
        self._pool: Any = None

    @property
    def recordings(self) -> int:
        """Graphs recorded so far."""
        return len(self._recordings)

    def records(self, device: torch.device) -> bool:
        """Whether calls on this device are recorded."""
        return self.record and device.type == "cuda"

    def __call__(self, batch: Batch, *, loop: bool) -> Tensor:
        """The batch's mean loss (detached, 0-dim); its weighted gradient is added to every parameter's `.grad`."""
        if not self.records(batch.inputs.device):
            return self._run(batch.inputs, batch.targets, batch.cu_seqlens, loop)
        documents = None if batch.cu_seqlens is None else batch.cu_seqlens.numel()
        key = (loop, self.model.late_qat, batch.inputs.shape, documents)
        if key not in self._recordings:
            self._recordings[key] = self._record(batch, loop)
        recording = self._recordings[key]
        recording.inputs.copy_(batch.inputs, non_blocking=True)
        recording.targets.copy_(batch.targets, non_blocking=True)
        if recording.cu_seqlens is not None and batch.cu_seqlens is not None:
            recording.cu_seqlens.copy_(batch.cu_seqlens, non_blocking=True)
        recording.graph.replay()
        return recording.loss.clone()

    def _run(self, inputs: Tensor, targets: Tensor, cu_seqlens: Tensor | None, loop: bool) -> Tensor:
        max_seqlen = self.max_seqlen if cu_seqlens is not None else None
        loss = self.model.loss(inputs, targets, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, loop=loop, fp8=self.fp8)
        assert isinstance(loss, Tensor)  # a pair only with hints
        (loss * self.weight).backward()
        return loss.detach()

    def _record(self, batch: Batch, loop: bool) -> _Recording:
        gradients = []
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        kept = [gradient.clone() for gradient in gradients]
        inputs, targets = batch.inputs.clone(), batch.targets.clone()
        cu_seqlens = None if batch.cu_seqlens is None else batch.cu_seqlens.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(EAGER_RUNS):
                self._run(inputs, targets, cu_seqlens, loop)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            loss = self._run(inputs, targets, cu_seqlens, loop)
        self._pool = graph.pool()
        torch._foreach_copy_(gradients, kept)
        return _Recording(graph, inputs, targets, cu_seqlens, loss)
