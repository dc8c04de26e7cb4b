"""Adaptive search of four AdamW hyperparameters with Optuna (`pip install -e '.[sweep]'`).

The model is the tiny variant of stdlib. The first ten trials are random; a tree-structured Parzen
estimator (TPE) proposes the later ones. Optuna keeps its state in `study.db`.

    lm sweep --config experiments/sweeps/search.py --workdir runs/search --parallel 2
    lm sweep --config experiments/sweeps/search.py:60 --workdir runs/search --parallel 2
"""

from lm.sweeps.sweep import Search


def suggest(trial):
    return {
        "optimizer.name": "adamw",
        "optimizer.learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True),
        "optimizer.weight_decay": trial.suggest_float("weight_decay", 1e-3, 1.0, log=True),
        "optimizer.adamw.b2": 1 - trial.suggest_float("1 - b2", 1e-3, 0.3, log=True),
        "schedule.warmup_steps": trial.suggest_int("warmup_steps", 0, 60),
        "train.steps": 300,
        "eval.every_steps": 0,
        "log.tensorboard": False,
    }


def get_sweep(trials="30"):
    return Search("experiments/stdlib.py:tiny", suggest, trials=int(trials))
