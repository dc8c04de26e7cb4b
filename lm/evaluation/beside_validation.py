"""Further evaluations during training: safety sets and lm-eval tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from lm.config.registry import listed
from lm.data.dataset import Dataset
from lm.errors import UserError
from lm.experiment import Experiment
from lm.models.variables import LORA, Params

HARNESS = "eval/harness/"
_OPTION = "--config.eval.harness="


def require_tasks(experiment: Experiment, dataset: Dataset) -> None:
    """Load the tasks of `eval.harness` and data of `eval.safety` before the first step.

    Raises:
        UserError: a task does not exist, data cannot be read, something does not fit the model, or
            there are no validation data for them or for `eval.best`.
    """
    config = experiment.config
    for key in ("best", "safety", "harness"):
        if config.eval[key] and not dataset.validation:
            raise UserError(
                f"--config.eval.{key}={config.eval[key]} needs validation data: set "
                "--config.data.validation_source or --config.data.validation_fraction"
            )
    if config.eval.safety:
        from lm.evaluation.safety.suite import require_sets

        require_sets(experiment)
    if config.eval.harness:
        from lm.evaluation.harness import load_tasks

        load_tasks(experiment, listed(config.eval.harness), option=_OPTION)


def further_figures(
    experiment: Experiment,
    params: Params,
    step: int,
    folder: Path,
    note: Callable[[str], Any],
    progress: Callable[[int], Any],
) -> dict[str, float]:
    """Run the evaluations due after a step; {} if there are none.

    Args:
        experiment: experiment on a mesh.
        params: inference parameters; LoRA updates may be separate.
        step: number of updates so far.
        folder: lm-eval results are written to its subfolder `harness-STEP`.
        note: called with lines for the user.
        progress: called with the number of further processed rows; may raise.

    Returns:
        Metrics as "eval/safety/SET/FIGURE" and "eval/harness/TASK/METRIC".
    """
    config, tokenizer = experiment.config, experiment.tokenizer
    assert tokenizer is not None
    figures: dict[str, float] = {}

    def is_due(period: int) -> bool:
        return step == config.train.steps or not period or step % period == 0

    if LORA in params:
        from lm.models.lora import merge_lora

        params = jax.jit(merge_lora, static_argnums=1)(params, config.lora.alpha)
    if config.eval.safety and is_due(config.eval.safety_every):
        from lm.evaluation.safety.suite import Subject, safety_figures

        subject = Subject(experiment, params, tokenizer, progress)
        figures |= safety_figures(subject, note)
    if config.eval.harness and is_due(config.eval.harness_every):
        from lm.decoding.generate_file import weights_identity
        from lm.evaluation.harness import evaluate_tasks, task_figures

        results = evaluate_tasks(
            experiment,
            params,
            tokenizer,
            listed(config.eval.harness),
            folder / f"harness-{step}",
            weights_identity(params, step),
            limit=config.eval.harness_limit or None,
            resamples=0,
            progress=progress,
            option=_OPTION,
        )
        figures |= {HARNESS + name: value for name, value in task_figures(results).items()}
    return figures
