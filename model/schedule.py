"""What changes from step to step: learning rate, Muon momentum, layer loop and late QAT.

    f     = elapsed / (max_wallclock_seconds - reserve_seconds), or step / iterations without a wall-clock budget
    lr    = 1 until f >= 1 - w, then max((1 - f) / w, min_lr)                                w = warmdown_frac
    mu    = from muon_momentum_warmup_start to muon_momentum, linear over muon_momentum_warmup_steps
    loop  = f >= enable_looping_at, or step >= loop_start_step where that is set
    qat   = lr < late_qat_threshold, and from then on

Pull request 1499 (`warmdown_iters` W > 0) foresees the length of its warm-down from the mean step time t = elapsed /
max(step, 1): with R seconds left, lr = min(1, R / (W t)); without a wall-clock budget (iterations - step) / W.

All functions are pure: ranks that agree on the elapsed time agree on everything else.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import TrainConfig
from model.errors import ConfigError


@dataclass(frozen=True)
class StepSettings:
    """What one optimiser step runs with."""

    fraction: float
    lr_scale: float
    muon_momentum: float
    loop: bool
    late_qat: bool


def budget_seconds(config: TrainConfig) -> float | None:
    """Seconds that training may take, or None without a wall-clock budget.

    Raises ConfigError when the reserve leaves nothing to train in.
    """
    if config.max_wallclock_seconds <= 0:
        return None
    budget = config.max_wallclock_seconds - config.reserve_seconds
    if budget <= 0:
        raise ConfigError(
            f"reserve_seconds: got {config.reserve_seconds:g}, "
            f"wanted less than max_wallclock_seconds={config.max_wallclock_seconds:g}"
        )
    return budget


def training_fraction(config: TrainConfig, step: int, elapsed: float) -> float:
    """Share of the budget that is used up when `step` begins, `elapsed` seconds after the first step began."""
    budget = budget_seconds(config)
    return step / max(config.iterations, 1) if budget is None else elapsed / budget


def lr_multiplier(config: TrainConfig, step: int, elapsed: float) -> float:
    """Factor on every learning rate, 0 to 1."""
    if config.warmdown_iters > 0:
        return _lr_multiplier_by_steps(config, step, elapsed)
    if config.warmdown_frac <= 0:
        return 1.0
    fraction = training_fraction(config, step, elapsed)
    if fraction < 1.0 - config.warmdown_frac:
        return 1.0
    return max((1.0 - fraction) / config.warmdown_frac, config.min_lr)


def _lr_multiplier_by_steps(config: TrainConfig, step: int, elapsed: float) -> float:
    budget = budget_seconds(config)
    if budget is None:
        left = config.iterations - step
        return max(left / config.warmdown_iters, config.min_lr) if 0 < left <= config.warmdown_iters else 1.0
    warmdown = config.warmdown_iters * elapsed / max(step, 1)
    left_seconds = max(budget - elapsed, 0.0)
    return max(left_seconds / max(warmdown, 1e-12), config.min_lr) if left_seconds <= warmdown else 1.0


def muon_momentum(config: TrainConfig, step: int) -> float:
    """Momentum of Muon at `step` (from 0)."""
    steps = config.muon_momentum_warmup_steps
    share = min(step / steps, 1.0) if steps > 0 else 1.0
    return (1.0 - share) * config.muon_momentum_warmup_start + share * config.muon_momentum


def loop_active(config: TrainConfig, step: int, fraction: float) -> bool:
    """Whether the layer loop runs. It never stops once it has started: step and fraction only grow."""
    if config.loop_start_step >= 0:
        return step >= config.loop_start_step
    return fraction >= config.enable_looping_at


def settings_at(
    config: TrainConfig, step: int, elapsed: float, *, has_loop: bool, late_qat: bool = False
) -> StepSettings:
    """Everything for one step; `has_loop` is False for a model without layers to loop over, `late_qat` whether the step
    before had it: a warm-down that is foreseen from step times can move away again."""
    fraction = training_fraction(config, step, elapsed)
    scale = lr_multiplier(config, step, elapsed)
    return StepSettings(
        fraction=fraction,
        lr_scale=scale,
        muon_momentum=muon_momentum(config, step),
        loop=has_loop and loop_active(config, step, fraction),
        late_qat=late_qat or (config.late_qat_threshold > 0 and scale < config.late_qat_threshold),
    )
