"""How a native or Triton function becomes a torch op.

Every kernel file registers its ops through :func:`register_op`: schema, CPU and CUDA kernels, fake, autograd and the
autocast redispatch; ops that write into their arguments through :func:`register_mutating_op`. Native functions get
addresses, sizes, strides, a dtype code and, on CUDA, a device ordinal and a stream; they check nothing, so everything
is checked before they are called.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pgolf_kernels import _native

LIBRARY: torch.library.Library = torch.library.Library("pgolf", "DEF")
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

_AUTOCAST_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def has_native_cuda() -> bool:
    """Whether the native module was built with CUDA."""
    return _native.has_cuda()


def runs_native(tensor: torch.Tensor) -> bool:
    """Whether compiled code takes this tensor: CPU-only builds have none for CUDA, packed submissions none at all."""
    return has_native_cuda() if tensor.is_cuda else not hasattr(_native, "STANDS_IN")


def num_threads() -> int:
    """Threads a native CPU kernel may use: PyTorch's own setting."""
    return torch.get_num_threads()


def stream_of(tensor: torch.Tensor) -> tuple[int, int]:
    """(device ordinal, address of the current CUDA stream) of a CUDA tensor."""
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream


def reference_on_cuda(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """A CUDA kernel for builds without CUDA: the PyTorch reference, announced once."""

    @functools.wraps(reference)
    def kernel(*args: Any) -> Any:
        _warn_once(name)
        return reference(*args)

    return kernel


@functools.cache
def _warn_once(name: str) -> None:
    warnings.warn(
        f"pgolf_kernels was built without CUDA: {name} runs its PyTorch reference on the GPU. "
        "`pgolf doctor` names the command that mends it.",
        RuntimeWarning,
        stacklevel=3,
    )


def register_op(
    schema: str,
    kernel: Callable[..., Any],
    *,
    cuda: Callable[..., Any] | None = None,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    not_differentiable: str = "not differentiable",
) -> Any:
    """Registers `pgolf::<schema>` and returns the op (call it like a function).

    `kernel` runs on CPU tensors and, unless `cuda` is given, on CUDA tensors too: Triton slices choose inside.
    `backward` and `setup_context` are those of `torch.library.register_autograd`. Without them a derivative raises
    `RuntimeError` with the op's name and `not_differentiable`: an op with no formula at all would give silently wrong
    second derivatives. The op returns tensors or one list of them, and its arguments have no defaults. Under autocast
    it sees its arguments unchanged and its body runs below autocast, so that eager and compiled results agree.
    """
    name, op = _define(schema, kernel, cuda or kernel, fake)

    if backward is None:

        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(f"pgolf::{name}: {not_differentiable}")

    LIBRARY.impl(name, _autograd(op, backward, setup_context), "Autograd", with_keyset=True)
    return op


def _autograd(
    op: Any, backward: Callable[..., Any], setup_context: Callable[..., Any] | None
) -> Callable[..., Tensor | Sequence[Tensor]]:
    """An op's kernel under the Autograd key, as `torch.library.register_autograd` makes one.

    That one reads the schema anew at every call and takes lists through pytree, which costs the host more than the
    rest of an eager call's way to its kernel. Here the schema is read once, and lists are spread among the arguments
    of one flat node.
    """
    lists = [str(argument.type) in ("List[Tensor]", "List[Optional[Tensor]]") for argument in op._schema.arguments]
    returns_list = str(op._schema.returns[0].type) == "List[Tensor]"

    def flat(values: Sequence[Any]) -> list[Any]:
        return [t for value, spread in zip(values, lists, strict=True) for t in (value if spread else (value,))]

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, args: tuple[Any, ...], *_: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                result = op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
                if setup_context is not None:
                    setup_context(ctx, args, result)
            ctx.lengths = [len(value) if spread else None for value, spread in zip(args, lists, strict=True)]
            return tuple(result) if returns_list else result

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            needs = ctx.needs_input_grad
            rest = iter(needs[2:])
            ctx.needs_input_grad = tuple([next(rest) if n is None else list(islice(rest, n)) for n in ctx.lengths])
            try:
                results = backward(ctx, list(grads)) if returns_list else backward(ctx, *grads)
            finally:
                ctx.needs_input_grad = needs  # for another walk over a graph that is kept
            return None, None, *flat(results if isinstance(results, tuple) else (results,))

    def kernel(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            result = Node.apply(keyset, args, *flat(args))
            return list(result) if returns_list else result
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return kernel


def register_mutating_op(schema: str, kernel: Callable[..., Any], *, fake: Callable[..., Any]) -> Any:
    """Registers `pgolf::<schema>`, whose schema names the arguments that `kernel` writes to (`Tensor(a!)`).

    Autograd takes no formula for such an op, so it is called where no graph is recorded: under `torch.no_grad()`, or in
    the forward of an autograd function. Autocast as in :func:`register_op`.
    """
    return _define(schema, kernel, kernel, fake)[1]


def _define(
    schema: str, cpu: Callable[..., Any], cuda: Callable[..., Any], fake: Callable[..., Any]
) -> tuple[str, Any]:
    """(name, op) with everything but autograd."""
    LIBRARY.define(schema)
    name = schema.split("(", 1)[0]
    op = getattr(torch.ops.pgolf, name).default
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"pgolf::{name}", fake, lib=LIBRARY)

    def below_autocast(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS):
            return op(*args)

    LIBRARY.impl(name, below_autocast, "AutocastCPU")
    LIBRARY.impl(name, below_autocast, "AutocastCUDA")
    return name, op
