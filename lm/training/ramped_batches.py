"""Training batches whose batch size and length grow with the step (`lm/config/ramps.py`)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from lm.config.ramps import Stage, stages
from lm.data.batches import Batches, MakeFeatures
from lm.errors import UserError
from lm.experiment import Experiment, resolve_parallelism


@dataclass(frozen=True, eq=False)
class RampedBatches(Batches):
    """Batches of several sizes; `at` selects the size for a step.

    Attributes:
        stages: stages of the ramp in order; the last has the full `batch_size`.
    """

    stages: tuple[Stage, ...] = ()

    def at(self, step: int) -> Batches:
        """Return batches with the size of the step's stage."""
        stage = next(stage for stage in reversed(self.stages) if stage.step <= step)
        own = {field.name: getattr(self, field.name) for field in fields(Batches)}
        return replace(
            Batches(**own),
            features=_first_columns(self.features, stage.length),
            batch_size=stage.rows,
            first_row=self.first_row + stage.first_row - stage.step * stage.rows,
        )


def ramped(experiment: Experiment, batches: Batches) -> RampedBatches:
    """Wrap the batches of an experiment with the stages of its ramps.

    Raises:
        UserError: a stage does not fit the mesh, or requires another attention kernel.
    """
    config, mesh = experiment.config, experiment.mesh
    found = tuple(stages(config.data))
    for stage in found:
        smaller = config.copy_and_resolve_references()
        smaller.data.update(batch_size=stage.rows, sequence_length=stage.length)
        platform, sizes = mesh.devices.flat[0].platform, dict(mesh.shape)
        where = f"--config.data: rows and length {stage.rows}, {stage.length} of step {stage.step}"
        try:
            _, attention = resolve_parallelism(smaller, platform, sizes)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if attention.kernel != experiment.attention.kernel:
            raise UserError(
                f"{where} would need the attention kernel {attention.kernel}, not "
                f"{experiment.attention.kernel}: set --config.model.attention=xla"
            )
    own = {field.name: getattr(batches, field.name) for field in fields(Batches)}
    return RampedBatches(**own, stages=found)


def _first_columns(features: MakeFeatures, length: int) -> MakeFeatures:
    def cut(example: Any, generator: np.random.Generator) -> dict[str, np.ndarray]:
        return {name: x[:length] for name, x in features(example, generator).items()}

    return cut
