"""Distillation: match a teacher's next-token distribution in addition to the tokens.

The teacher is a frozen model of any size (`lm/models/frozen.py`), or its outputs were stored
beforehand (`stored_teacher.py`).

Shape letters: B batch, L length, D model, V vocabulary, K most likely tokens of the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lm.config import fill_defaults, read_run_file
from lm.data.batches import Arrays, Example
from lm.data.store import TokenStore
from lm.data.tokenizer import Tokenizer
from lm.errors import UserError
from lm.models.attention import choose_attention
from lm.models.frozen import TEACHER, teacher_variables
from lm.models.transformer_config import make_model
from lm.objectives.causal import Causal
from lm.objectives.chunked_losses import in_chunks
from lm.objectives.losses import cross_entropy
from lm.objectives.objective import Batch, BoundModel, LossSums, Shapes
from lm.objectives.stored_teacher import stored_settings, taught_windows
from lm.parallel.mesh import AXES, current_mesh
from lm.storage import is_step, resolve_path


class TokenFigures(NamedTuple):
    """Per-target losses and metrics, float32 [B, L]."""

    loss_BL: jax.Array
    nll_BL: jax.Array
    correct_BL: jax.Array
    divergence_BL: jax.Array


def divergence(
    logits_BLV: jax.Array,
    teacher_BLK: jax.Array,
    ids_BLK: jax.Array | None,
    temperature: float,
) -> jax.Array:
    """Return KL(teacher ‖ student) of each token, multiplied by temperature squared, [B, L].

    With the teacher's top K tokens, its probabilities are normalized over them, the student's over
    all tokens (Hinton et al. 2015, §2, for the temperature and its square).

    Args:
        logits_BLV: logits of the student.
        teacher_BLK: logits or log-probabilities of the teacher.
        ids_BLK: token ids of the teacher's entries; None: all tokens in order.
        temperature: divisor of the logits.
    """
    log_q = jax.nn.log_softmax(logits_BLV.astype(jnp.float32) / temperature)
    log_p = jax.nn.log_softmax(teacher_BLK.astype(jnp.float32) / temperature)
    if ids_BLK is not None:
        log_q = jnp.take_along_axis(log_q, ids_BLK, axis=-1)
    return temperature**2 * (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


@dataclass(frozen=True)
class Distillation(Causal):
    """Next-token prediction mixed with the divergence from a teacher.

    Attributes:
        options: section "objective" of the configuration.
    """

    families: ClassVar[Any] = ("decoder",)

    options: Any = None

    @classmethod
    def from_config(cls, config: ConfigDict, tokenizer: Tokenizer | None) -> Distillation:
        found = super().from_config(config, tokenizer)
        assert isinstance(found, Distillation)
        return replace(found, options=config.objective)

    @property
    def shapes(self) -> Shapes:
        if not self.options.teacher_logits:
            return super().shapes
        row = (self.length, stored_settings(self.options.teacher_logits)["top_k"])
        stored = {"teacher_logps": (row, "float32"), "teacher_ids": (row, "int32")}
        return {**super().shapes, **stored}

    def examples(self, store: TokenStore, training: bool) -> Any:
        """Return windows of L + 1 tokens, with stored teacher outputs if any."""
        o, windows = self.options, super().examples(store, training)
        if training and bool(o.teacher) == bool(o.teacher_logits):
            raise UserError(
                "--config.objective.name=distillation needs a teacher: set either "
                "--config.objective.teacher or --config.objective.teacher_logits"
            )
        if not o.teacher_logits:
            return windows
        return taught_windows(windows, store, o.teacher_logits, self.isolate_documents)

    def features(self, example: Example, rng: np.random.Generator) -> Arrays:
        """Return the features of `Causal`, with stored teacher outputs if any."""
        stored = {
            name: example[name] for name in ("teacher_logps", "teacher_ids") if name in example
        }
        return {**super().features(example, rng), **stored}

    @property
    def frozen(self) -> tuple[str, ...]:  # type: ignore[override]
        return (TEACHER,) if self.options.teacher else ()

    def loss(self, model: Any, batch: Batch) -> LossSums:
        """Return the mixed loss of every next token, and the divergence."""
        arguments = batch["inputs"], batch.get("positions"), batch.get("segment_ids")
        x_BLD, o = model.hidden(*arguments), self.options
        columns: list[jax.Array] = [x_BLD, batch["targets"]]
        of_teacher: Any = None
        if self.frozen:
            teacher: Any = teacher_module(o.teacher, self.length)
            if teacher.config.vocab_size != model.config.vocab_size:
                raise UserError(
                    f"--config.objective.teacher={o.teacher} has a vocabulary of "
                    f"{teacher.config.vocab_size} tokens, the model {model.config.vocab_size}"
                )
            variables = teacher_variables(model, teacher, *arguments)
            columns.append(cast(jax.Array, teacher.apply(variables, *arguments, method="hidden")))

            def of_teacher(x_BLD: jax.Array) -> tuple[jax.Array, jax.Array | None]:
                found: Any = teacher.apply(variables, x_BLD, method="logits")
                return jax.lax.top_k(found, o.distill_top_k) if o.distill_top_k else (found, None)

        if o.teacher_logits:
            columns += [batch["teacher_logps"], batch["teacher_ids"]]

            def of_teacher(logps_BLK: jax.Array, ids_BLK: jax.Array) -> tuple[jax.Array, jax.Array]:
                k = o.distill_top_k or ids_BLK.shape[-1]
                return logps_BLK[..., :k], ids_BLK[..., :k]

        def compute(
            model: BoundModel, x_BLD: jax.Array, targets_BL: jax.Array, *rest: jax.Array
        ) -> TokenFigures:
            logits_BLV = model.logits(x_BLD)
            losses = cross_entropy(logits_BLV, targets_BL, self.label_smoothing, self.z_loss)
            apart_BL = jnp.zeros_like(losses.loss_BL)
            if of_teacher is not None:
                of_BLK, ids_BLK = of_teacher(*rest)
                apart_BL = divergence(logits_BLV, of_BLK, ids_BLK, o.distill_temperature)
            mixed_BL = (1 - o.distill_weight) * losses.loss_BL + o.distill_weight * apart_BL
            return TokenFigures(mixed_BL, losses.nll_BL, losses.correct_BL, apart_BL)

        figures = in_chunks(compute, model, *columns)
        weights_BL = batch["weights"]
        sums = jax.tree.map(lambda value_BL: (value_BL * weights_BL).sum(), figures)
        metrics = {"nll": sums.nll_BL, "accuracy": sums.correct_BL, "kl": sums.divergence_BL}
        return LossSums(sums.loss_BL, weights_BL.sum(), metrics)


@cache
def teacher_config(place: str) -> ConfigDict:
    """Return the configuration of a teacher run, with LoRA updates merged.

    Args:
        place: workdir of the run, or RUN/checkpoints/STEP.

    Raises:
        UserError: the run does not exist, or is not a decoder.
    """
    folder = resolve_path(place)
    workdir = folder.parent.parent if is_step(folder.name) else folder
    if not (workdir / "run.json").is_file():
        raise UserError(f"--config.objective.teacher={place}: not a run (no run.json)")
    config = read_run_file(workdir / "run.json")
    if config.model.family != "decoder":
        raise UserError(
            f"--config.objective.teacher={place} is of family {config.model.family}, not a decoder"
        )
    return config


def teacher_module(place: str, length: int) -> nn.Module:
    """Return the module of a teacher for the mesh of the step being traced.

    Args:
        place: see `teacher_config`.
        length: row length in tokens.
    """
    mesh = current_mesh()
    device = mesh.devices.flat[0] if mesh else jax.devices()[0]
    config = fill_defaults(teacher_config(place), device.platform)
    model = config.model
    if model.positions == "learned" and model.max_length < length:
        raise UserError(
            f"--config.objective.teacher={place} reads at most {model.max_length} tokens, not "
            f"--config.data.sequence_length={length}"
        )
    config.data.sequence_length, config.model.attention = length, "auto"
    sizes = dict(mesh.shape) if mesh else dict.fromkeys(AXES, 1)
    capability = getattr(device, "compute_capability", "")
    chosen = choose_attention(config, device.platform, sizes, capability)
    return make_model(config, chosen.kernel, chosen.across)
