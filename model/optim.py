"""The optimiser: Muon for the matrices, AdamW for the rest, clipping, and the moving average of the weights.

Muon with row normalisation (pull requests 1413 to 1727), for every matrix W [rows, cols] of a bank:

    m <- mu m + g;  u = g + mu m                                            (Nesterov)
    u <- u / max(|u_row|, 1e-7), row by row;  X = u / (|u|_F + 1e-7)
    5 times: A = X X^T;  X <- a X + (b A + c A A) X                         (Newton-Schulz, on the wide side)
    W <- (1 - lr wd) W - lr sqrt(max(1, rows / cols)) X

pgolf_kernels/muon.py has the functions. The factor of clipping goes to the first of them, so that no pass multiplies g.

Over several ranks each bank is padded to a multiple of their number; gradients are reduce-scattered, each rank updates
its share of the matrices, and the updates are all-gathered while the next banks and AdamW are computed. Momentum is
fp32 and sharded. Communication and Newton-Schulz run in bf16 under `dtype="bfloat16"`.

Up and down banks have the same shape after transposition and go through one batched Newton-Schulz.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.config import TrainConfig
from model.distributed import Dist
from model.errors import ArtifactError
from pgolf_kernels import muon_apply, muon_direction, orthogonalize

_MATRICES = frozenset({"qo_bank", "kv_bank", "up_bank", "down_bank", "bigram_proj"})
EMBEDDINGS = frozenset({"tok_emb", "bigram_embed"})
# Gradients of up to this many elements share one all-reduce: below, latency costs more than the copy.
_PACKED_ELEMENTS = 32768


@dataclass
class _Exchange:
    """Buffers through which a bank's gradients and updates go between ranks, and the collective that is under way."""

    send: Tensor  # [padded, rows, cols]: gradients to reduce
    share: Tensor  # [padded / world, rows, cols]: their sum
    received: Tensor  # [padded, min(rows, cols), max(rows, cols)]: everybody's updates
    work: dist.Work | None = None

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()


@dataclass
class _Bank:
    """One parameter of stacked matrices and this rank's share of its optimiser state."""

    name: str
    param: nn.Parameter
    scale: float
    momentum: Tensor  # [padded / world, rows, cols], fp32
    exchange: _Exchange | None  # None in a world of one

    def matrices(self, tensor: Tensor) -> Tensor:
        """`tensor` (the parameter, or of its shape) as [n, rows, cols]."""
        return tensor.reshape(-1, *self.param.shape[-2:])

    @property
    def gradient(self) -> Tensor:
        return self.matrices(_gradient(self.param))

    @property
    def wide_shape(self) -> tuple[int, int]:
        rows, cols = self.param.shape[-2:]
        return min(rows, cols), max(rows, cols)


def _gradient(param: nn.Parameter) -> Tensor:
    """A parameter that the loss does not reach has a gradient of zeros."""
    if param.grad is None:
        param.grad = torch.zeros_like(param)
    return param.grad


class Muon:
    """See the module's docstring. `params` maps names to parameters [n, rows, cols] or [rows, cols]."""

    def __init__(self, params: dict[str, nn.Parameter], config: TrainConfig, ranks: Dist, dtype: torch.dtype) -> None:
        self._config, self._ranks, self._dtype = config, ranks, dtype
        banks = [self._make_bank(name, param) for name, param in params.items()]
        groups: dict[tuple[int, int], list[_Bank]] = {}
        for bank in banks:
            groups.setdefault(bank.wide_shape, []).append(bank)
        # Largest first: their communication has the rest of the step to hide behind.
        self._groups = sorted(groups.values(), key=lambda group: -sum(bank.param.numel() for bank in group))

    def _make_bank(self, name: str, param: nn.Parameter) -> _Bank:
        rows, cols = param.shape[-2:]
        world = self._ranks.world
        count = param.numel() // (rows * cols)
        share = -(-count // world)
        state_dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
        momentum = torch.zeros(share, rows, cols, dtype=state_dtype, device=param.device)
        exchange = None
        if world > 1:
            whole = torch.zeros(share * world, rows, cols, dtype=self._dtype, device=param.device)
            received = whole.new_empty(share * world, min(rows, cols), max(rows, cols))
            exchange = _Exchange(whole, torch.empty_like(whole[:share]), received)
        return _Bank(name, param, max(1.0, rows / cols) ** 0.5, momentum, exchange)

    @property
    def _banks(self) -> list[_Bank]:
        return [bank for group in self._groups for bank in group]

    @torch.no_grad()
    def start_reduction(self, factor: Tensor | None = None) -> None:
        """Begins to sum the gradients over the ranks, multiplied by `factor` (a scalar tensor) if given."""
        for bank in self._banks:
            if bank.exchange is not None:
                gradient = bank.gradient
                target = bank.exchange.send[: len(gradient)]
                if factor is None:
                    target.copy_(gradient)
                else:
                    torch.mul(gradient, factor, out=target)
                bank.exchange.work = self._ranks.reduce_scatter_async(bank.exchange.share, bank.exchange.send)

    def shares(self, banks: list[_Bank] | None = None) -> list[Tensor]:
        """This rank's share of the averaged gradients, [n, rows, cols] each; waits for their reduction."""
        return [self._share(bank) for bank in (self._banks if banks is None else banks)]

    def _share(self, bank: _Bank) -> Tensor:
        if bank.exchange is None:
            return bank.gradient.to(bank.momentum.dtype)
        bank.exchange.wait()
        # A copy also where the dtype is the same: global clipping asks twice, and the sum must stay.
        return bank.exchange.share.to(bank.momentum.dtype, copy=True).div_(self._ranks.world)

    @torch.no_grad()
    def step(self, lr: float, momentum: float, factor: Tensor | None = None) -> None:
        """One update after `start_reduction`; gradients are multiplied by `factor` (a scalar tensor) if given.

        Over several ranks `finish_step` has to follow.
        """
        for group in self._groups:
            direction = muon_direction(
                self.shares(group),
                [bank.momentum for bank in group],
                momentum,
                factor=factor,
                row_normalize=self._config.muon_row_normalize,
                dtype=self._dtype,
            )
            updates = orthogonalize(direction, self._config.muon_steps, self._dtype, normalized=True)
            for bank, update in zip(group, updates.split([len(bank.momentum) for bank in group]), strict=True):
                if bank.exchange is None:
                    self._apply(bank, update, lr)
                else:
                    bank.exchange.work = self._ranks.all_gather_async(bank.exchange.received, update)

    @torch.no_grad()
    def finish_step(self, lr: float) -> None:
        """Applies the updates of all ranks when they have arrived."""
        for bank in self._banks:
            if bank.exchange is not None:
                bank.exchange.wait()
                self._apply(bank, bank.exchange.received[: len(bank.matrices(bank.param))], lr)

    def _apply(self, bank: _Bank, update: Tensor, lr: float) -> None:
        weights = bank.param.view(-1, *bank.param.shape[-2:])
        muon_apply(weights, update, keep=1.0 - lr * self._config.muon_wd, rate=lr * bank.scale)

    def state(self) -> dict[str, Tensor]:
        """Momentum of every bank, whole and unpadded, whatever the number of ranks. A collective."""
        return {f"momentum.{bank.name}": self._gathered(bank).view(bank.param.shape) for bank in self._banks}

    def _gathered(self, bank: _Bank) -> Tensor:
        count = bank.matrices(bank.param).size(0)
        if self._ranks.world == 1:
            return bank.momentum
        whole = torch.empty(len(bank.momentum) * self._ranks.world, *bank.momentum.shape[1:], dtype=bank.momentum.dtype)
        whole = whole.to(bank.momentum.device)
        self._ranks.all_gather_async(whole, bank.momentum).wait()
        return whole[:count]

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`, for any number of ranks."""
        for bank in self._banks:
            whole = bank.matrices(_take(state, f"momentum.{bank.name}", bank.param.shape))
            share = len(bank.momentum)
            mine = whole[self._ranks.rank * share : (self._ranks.rank + 1) * share]
            bank.momentum.zero_()
            bank.momentum[: len(mine)].copy_(mine)

    @torch.no_grad()
    def reset(self) -> None:
        for bank in self._banks:
            bank.momentum.zero_()


class _Average:
    """Averaging over the ranks that runs while other work does. `finish` makes `tensors` the averages, in place."""

    def __init__(self, tensors: list[Tensor], ranks: Dist) -> None:
        self.tensors, self._world = tensors, ranks.world
        self._pending: list[dist.Work] = []
        self._small = [t for t in tensors if t.numel() <= _PACKED_ELEMENTS]
        if self._world > 1:
            self._packed = torch.cat([t.flatten() for t in self._small])
            large = [t for t in tensors if t.numel() > _PACKED_ELEMENTS]
            self._pending = [ranks.sum_async(t) for t in [*large, self._packed]]

    def finish(self) -> None:
        if not self._pending:
            return
        for work in self._pending:
            work.wait()
        self._pending = []
        parts = self._packed.split([t.numel() for t in self._small])
        torch._foreach_copy_(self._small, [part.view_as(t) for part, t in zip(parts, self._small, strict=True)])
        torch._foreach_div_(self.tensors, self._world)


class Optimizer:
    """Everything that changes the weights of a GPT: `step` after the gradients of a step's micro-batches are summed.

    `params` are the model's named parameters. Gradients are this rank's; ranks are averaged here.
    `ns_dtype` overrides the dtype of Newton-Schulz and of the communication.
    """

    def __init__(
        self, params: dict[str, nn.Parameter], config: TrainConfig, ranks: Dist, *, ns_dtype: torch.dtype | None = None
    ) -> None:
        self._config, self._ranks = config, ranks
        self._params = params
        matrices = {name: p for name, p in params.items() if name in _MATRICES}
        embeddings = [p for name, p in params.items() if name in EMBEDDINGS]
        scalars = [p for name, p in params.items() if name not in _MATRICES | EMBEDDINGS]
        self.muon = Muon(matrices, config, ranks, ns_dtype or getattr(torch, config.dtype))
        self._replicated = [p for name, p in params.items() if name not in _MATRICES]
        self.adamw = torch.optim.AdamW(
            [
                {"params": embeddings, "lr": config.tied_embed_lr, "weight_decay": config.embed_wd},
                {"params": scalars, "lr": config.scalar_lr, "weight_decay": config.adam_wd},
            ],
            betas=(config.beta1, config.beta2),
            eps=config.adam_eps,
            **({"fused": True} if embeddings[0].is_cuda else {"foreach": True}),
        )
        self._base_lrs = [group["lr"] for group in self.adamw.param_groups]

    @torch.no_grad()
    def zero_grad(self) -> None:
        """In place: a recorded micro-step adds to the gradients where they lie."""
        gradients = [p.grad for p in self._params.values() if p.grad is not None]
        if gradients:
            torch._foreach_zero_(gradients)

    @torch.no_grad()
    def step(self, lr_scale: float, momentum: float) -> Tensor:
        """One update; clears the gradients. Returns the gradients' norm before clipping (a scalar, on the device).

        With `grad_clip="per_rank"` each rank clips its own gradients before they are averaged, and the norm is this
        rank's; with "global" the average is clipped.
        """
        config, several = self._config, self._ranks.world > 1
        local = config.grad_clip == "per_rank" or not several
        gradients = [_gradient(p) for p in self._replicated]
        if local:
            norm = nn.utils.get_total_norm([p.grad for p in self._params.values() if p.grad is not None], foreach=True)
            factor = self._clip(norm, gradients)
        # Each gradient is multiplied once: before it is averaged, or where Muon reads it.
        early = local and several
        self.muon.start_reduction(factor if early else None)
        replicated = _Average(gradients, self._ranks)
        if not local:
            replicated.finish()
            norm = self._global_norm(gradients)
            factor = self._clip(norm, gradients)
        lr = config.matrix_lr * lr_scale
        self.muon.step(lr, momentum, None if early else factor)
        replicated.finish()
        for group, base in zip(self.adamw.param_groups, self._base_lrs, strict=True):
            group["lr"] = base * lr_scale
        self.adamw.step()
        self.muon.finish_step(lr)
        self.zero_grad()
        return norm

    def _clip(self, norm: Tensor, replicated: list[Tensor]) -> Tensor:
        """The factor of clipping, by which the replicated gradients are multiplied here."""
        limit = self._config.grad_clip_norm if self._config.grad_clip_norm > 0 else torch.inf
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(replicated, factor)
        return factor

    def _global_norm(self, replicated: list[Tensor]) -> Tensor:
        squares = [
            torch.stack(torch._foreach_norm(tensors)).square().sum() for tensors in (self.muon.shares(), replicated)
        ]
        return (self._ranks.sum_(squares[0]) + squares[1]).sqrt()

    def state(self) -> dict[str, Tensor]:
        """All optimiser state as named tensors. A collective."""
        tensors = self.muon.state()
        for name, param in self._params.items():
            for key, value in self.adamw.state.get(param, {}).items():
                tensors[f"adamw.{name}.{key}"] = value
        return tensors

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`. Raises ArtifactError for a tensor that is missing or has another shape."""
        self.muon.load_state(state)
        self.adamw.state.clear()
        for name, param in self._params.items():
            prefix = f"adamw.{name}."
            if f"{prefix}step" not in state:
                continue
            self.adamw.state[param] = {
                "step": _take(state, f"{prefix}step", torch.Size([]))
                .to(param.device if param.is_cuda else "cpu")
                .clone(),
                "exp_avg": _take(state, f"{prefix}exp_avg", param.shape).to(param.device, copy=True),
                "exp_avg_sq": _take(state, f"{prefix}exp_avg_sq", param.shape).to(param.device, copy=True),
            }

    def reset(self, *, momentum: bool = True) -> None:
        """As after construction; `momentum=False` leaves Muon's momentum as it is."""
        self.zero_grad()
        self.adamw.state.clear()
        if momentum:
            self.muon.reset()


class WeightAverage:
    """Exponential moving average of the weights: avg <- avg + (1 - decay) (w - avg), after every step.

    fp32 throughout; `ema_dtype="parameter"` keeps the embeddings' average in bfloat16, as pull request 1499 does.
    """

    def __init__(self, params: dict[str, nn.Parameter], config: TrainConfig) -> None:
        self._decay = config.ema_decay
        rounded = EMBEDDINGS if config.ema_dtype == "parameter" else frozenset()
        self._params = params
        self.average = {
            name: p.detach().to(torch.bfloat16 if name in rounded else p.dtype, copy=True) for name, p in params.items()
        }
        self._exact = [name for name in params if name not in rounded]
        self._rounded = [name for name in params if name in rounded]

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(
            [self.average[name] for name in self._exact],
            [self._params[name] for name in self._exact],
            1.0 - self._decay,
        )
        for name in self._rounded:
            average = self.average[name]
            average.mul_(self._decay).add_(self._params[name].to(average.dtype), alpha=1.0 - self._decay)

    @torch.no_grad()
    def reset(self) -> None:
        """Starts again from the present weights."""
        for name, average in self.average.items():
            average.copy_(self._params[name])

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, average in self.average.items():
            average.copy_(_take(state, name, average.shape))


def _take(state: dict[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    if name not in state:
        raise ArtifactError(f"checkpoint: tensor {name!r} is missing")
    if state[name].shape != shape:
        raise ArtifactError(f"checkpoint: tensor {name!r} has shape {tuple(state[name].shape)}, wanted {tuple(shape)}")
    return state[name]
