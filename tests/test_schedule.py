"""Schedules against the curves of the reference systems."""

import pytest

from model import schedule
from model.config import TrainConfig
from model.errors import ConfigError
from model.presets import get_preset
from tests.golden import load_json

CURVES = load_json("schedules.json")
SYSTEMS = ("1413", "1499", "1514", "1530", "1727")
BY_FRACTION = tuple(s for s in SYSTEMS if s != "1499")


def train_config(system: str) -> TrainConfig:
    return get_preset(f"pr{system}").train


@pytest.mark.parametrize("system", SYSTEMS)
def test_budget(system):
    assert schedule.budget_seconds(train_config(system)) * 1000 == pytest.approx(CURVES[system]["wallclock_cap_ms"])


@pytest.mark.parametrize("system", BY_FRACTION)
def test_lr_multiplier(system):
    config = train_config(system)
    budget = schedule.budget_seconds(config)
    for fraction, expected in CURVES[system]["lr_mul"]:
        assert schedule.lr_multiplier(config, 0, fraction * budget) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_lr_multiplier_by_steps():
    config = train_config("1499")
    for step, elapsed_ms, expected in CURVES["1499"]["lr_mul_step_elapsedms_value"]:
        assert schedule.lr_multiplier(config, step, elapsed_ms / 1000) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    config = get_preset("pr1499").replace(max_wallclock_seconds=0.0).train
    for step, expected in CURVES["1499"]["lr_mul_no_wallclock_step_value"]:
        assert schedule.lr_multiplier(config, step, 123.0) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("system", BY_FRACTION)
def test_training_fraction(system):
    config = train_config(system)
    for step, elapsed_ms, expected in CURVES[system]["training_frac_step_elapsedms_value"]:
        assert schedule.training_fraction(config, step, elapsed_ms / 1000) == pytest.approx(expected, rel=1e-12)


def test_training_fraction_counts_steps_without_a_wall_clock():
    config = TrainConfig(max_wallclock_seconds=0.0, iterations=200)
    assert schedule.training_fraction(config, 50, elapsed=1e6) == 0.25


@pytest.mark.parametrize("system", SYSTEMS)
def test_muon_momentum(system):
    for step, expected in CURVES[system]["muon_momentum"]:
        assert schedule.muon_momentum(train_config(system), step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("system", BY_FRACTION)
def test_loop_activation(system):
    for fraction, expected in CURVES[system]["loop_active"]:
        assert schedule.loop_active(train_config(system), 0, fraction) is expected


def test_loop_activation_by_step():
    start = CURVES["1499"]["recurrence_starts_at_step"]
    config = train_config("1499")
    assert not schedule.loop_active(config, start - 1, 1.0)
    assert schedule.loop_active(config, start, 0.0)


@pytest.mark.parametrize("system", BY_FRACTION)
def test_layer_order(system):
    encoder, decoder = get_preset(f"pr{system}").model.layer_order(loop=True)
    assert list(encoder) == CURVES[system]["encoder_indices"]
    assert list(decoder) == CURVES[system]["decoder_indices"]
    assert get_preset(f"pr{system}").model.num_skips == CURVES[system]["num_skip_weights"]


def test_settings_at_joins_them():
    config = train_config("1499")
    threshold = CURVES["1499"]["late_qat_when_lr_multiplier_below"]
    seen = set()
    for step, elapsed_ms, expected in CURVES["1499"]["lr_mul_step_elapsedms_value"]:
        settings = schedule.settings_at(config, step, elapsed_ms / 1000, has_loop=True)
        assert settings.late_qat is (expected < threshold)
        assert settings.loop is (step >= 3000)
        seen.add(settings.late_qat)
    assert seen == {True, False}
    assert schedule.settings_at(config, 5000, 0.0, has_loop=False).loop is False


def test_late_qat_stays_on_where_the_foreseen_warmdown_moves_away():
    config = train_config("1499")
    slow, fast = (1, 0.5), (2, 0.6)
    assert schedule.settings_at(config, *slow, has_loop=True).late_qat
    assert not schedule.settings_at(config, *fast, has_loop=True).late_qat
    assert schedule.settings_at(config, *fast, has_loop=True, late_qat=True).late_qat


def test_a_reserve_that_leaves_nothing_is_refused():
    with pytest.raises(ConfigError, match="reserve_seconds: got 13"):
        schedule.budget_seconds(TrainConfig(max_wallclock_seconds=10.0))
