from math import cos, pi

import pytest

from lm.config import default
from lm.config.registries import SCHEDULES
from lm.optim.optimizers import make_schedule

PEAK, W, T = 3e-3, 20, 120  # warm-up and train steps


def rate(step, **options):
    config = default()
    for name, value in {"warmup_steps": W, "final_ratio": 0.1, **options}.items():
        config.schedule[name] = value
    return float(make_schedule(PEAK, config.schedule, T)(step))


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_rises_to_the_peak_and_wastes_no_update(name):
    for step in (0, 1, 7, W - 1):
        assert rate(step, name=name) == pytest.approx(PEAK * (step + 1) / W, rel=1e-5)
    assert rate(0, name=name, warmup_steps=1) == pytest.approx(PEAK, rel=1e-5)
    assert rate(1, name=name, warmup_steps=1) == pytest.approx(
        PEAK * (0.5**0.5 if name == "inverse_sqrt" else 1), rel=1e-3
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_warm_up_the_first_update_has_the_peak(name):
    assert rate(0, name=name, warmup_steps=0) == pytest.approx(PEAK, rel=1e-5)


@pytest.mark.parametrize("step", [W, W + 1, 60, T - 1, T + 30])
def test_after_the_warm_up(step):
    done = min((step - W) / (T - W), 1)
    down = min(max((step - 90) / 30, 0), 1)  # wsd: the last quarter
    expected = {
        "constant": PEAK,
        "cosine": PEAK * (0.1 + 0.9 * (1 + cos(pi * done)) / 2),
        "linear": PEAK * (1 - 0.9 * done),
        "wsd": PEAK * (1 - 0.9 * down),
        "inverse": PEAK / (1 + 9 * (step - W) / (T - W)),
        "inverse_sqrt": PEAK * (W / (step + 1)) ** 0.5,
        "step": PEAK * 0.7 ** ((step - W) // 15),
    }
    assert expected.keys() == SCHEDULES.keys()
    for name, value in expected.items():
        found = rate(step, name=name, wsd_decay_fraction=0.25, step_every=15, step_factor=0.7)
        assert found == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("step", [0, 10, 3999, 4000, 100_000])
def test_inverse_sqrt_is_equation_3_of_the_2017_paper(step):
    config = default()
    config.schedule.name, config.schedule.warmup_steps = "inverse_sqrt", 4000
    s = step + 1
    schedule = make_schedule((512 * 4000) ** -0.5, config.schedule, 100_000)
    expected = 512**-0.5 * min(s**-0.5, s * 4000**-1.5)
    assert float(schedule(step)) == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("step", [0, 10, 9999, 10_000, 10_001, 524_288])
def test_inverse_sqrt_held_is_the_schedule_of_t5(step):
    """Raffel et al. 2020, §3.1.2: 1 / sqrt(max(n, k)) with k = 10^4."""
    config = default()
    config.schedule.name, config.schedule.hold_steps = "inverse_sqrt", 10_000
    schedule = make_schedule(0.01, config.schedule, 524_288)
    assert float(schedule(step)) == pytest.approx(max(step + 1, 10_000) ** -0.5, rel=1e-4)


@pytest.mark.parametrize("epoch", [1, 5, 6, 7, 8, 39])
def test_step_held_is_the_schedule_of_the_lstm_of_2014(epoch):
    """Zaremba et al. 2014, §4.1: "after 6 epochs we decrease it by a factor of 1.2 after each"."""
    config = default()
    config.schedule.name, config.schedule.step_factor = "step", 1 / 1.2
    config.schedule.hold_steps, config.schedule.step_every = 5 * 1327, 1327
    schedule = make_schedule(1.0, config.schedule, 39 * 1327)
    for step in ((epoch - 1) * 1327, epoch * 1327 - 1):
        assert float(schedule(step)) == pytest.approx(1.2 ** -max(epoch - 6, 0), rel=1e-4)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("held", [0, 13])
def test_peak_is_held_and_the_decay_still_ends_in_time(name, held):
    options = {"name": name, "hold_steps": held, "step_every": 100}
    assert rate(W + held, **options) == pytest.approx(PEAK, rel=0.03)
    assert rate(W + held - 1, **options) == pytest.approx(PEAK, rel=1e-5)
    if name in ("cosine", "linear", "inverse", "wsd"):
        assert rate(T, **options) == pytest.approx(0.1 * PEAK, rel=1e-4)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_decay_steps_ends_the_decay_before_the_run_ends(name):
    assert rate(79, name=name, decay_steps=80) > 0.1 * PEAK
    for step in (80, 100, T):
        assert rate(step, name=name, decay_steps=80) == pytest.approx(0.1 * PEAK, rel=1e-4)
