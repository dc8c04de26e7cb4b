"""Optimizers and schedules that a user's own file registers."""

from __future__ import annotations

import json

import pytest
from plugins import forget_plugins

from lm.cli import main

PLUGIN = '''
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from lm.config.registries import OPTIMIZERS, SCHEDULES
from lm.config.registry import option
from lm.models.variables import Kind


@dataclass(frozen=True)
class SignOptions:
    norm_factor: float = option(0.5, "Learning rate of norms over that of the rest.", low=0.0)


@OPTIMIZERS.register("sign", options=SignOptions)
def sign(schedule, options, table):
    """Sign descent; norms learn at a rate of their own."""
    factor = options.sign.norm_factor

    def update(grads, state, params=None):
        def one(info, g):
            return jnp.sign(g) * (factor if info.role.kind == Kind.NORM else 1.0)

        return table.map(one, grads), state

    return optax.chain(
        optax.GradientTransformation(lambda params: optax.EmptyState(), update),
        optax.add_decayed_weights(options.weight_decay, table.decay_mask),
        optax.scale_by_learning_rate(schedule),
    )


@dataclass(frozen=True)
class HalvingOptions:
    halve_every: int = option(2, "Steps after which halving halves the rate.", low=1)


@SCHEDULES.register("halving", options=HalvingOptions)
def halving(peak, options, start, end):
    return lambda t: peak * 0.5 ** (t // options.halve_every)
'''

CONFIG = """
import my_plugin
from lm.config import default


def get_config():
    config = default()
    config.model.n_layers, config.model.d_model, config.model.n_heads = 1, 8, 2
    config.data.source, config.data.documents = "text:{text}", "line"
    config.data.sequence_length, config.data.batch_size = 16, 4
    config.optimizer.name, config.optimizer.sign.norm_factor = "sign", 0.25
    config.schedule.name, config.schedule.halve_every = "halving", 1
    config.optimizer.learning_rate, config.optimizer.clip_norm = 0.5, 0.0
    config.optimizer.weight_decay = 0.0
    config.train.steps, config.log.tensorboard, config.log.every_steps = 3, False, 1
    return config
"""


@pytest.fixture(autouse=True)
def _fresh_process():
    forget_plugins()
    yield
    forget_plugins()


@pytest.mark.usefixtures("one_device")
def test_run_with_an_optimizer_and_a_schedule_of_the_user(tmp_path, text_file, capsys):
    (tmp_path / "my_plugin.py").write_text(PLUGIN)
    (tmp_path / "config.py").write_text(CONFIG.format(text=text_file))
    run, config = tmp_path / "run", ["--config", str(tmp_path / "config.py")]
    words = ["train", *config, "--workdir", str(run)]
    assert main([*words, "--config.train.stop_at=2"]) == 75, capsys.readouterr().err
    forget_plugins()
    assert main(words) == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert rates == [0.5, 0.25, 0.125]
    capsys.readouterr()
    assert main([*words, "--config.optimizer.name=sing"]) == 2
    assert "sign" in capsys.readouterr().err
