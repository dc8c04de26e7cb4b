"""Preference optimization, from pairs of chosen and rejected, or from good and bad completions.

A pair is one row of 2L tokens in two segments (prompt and chosen, prompt and rejected): attention
and positions stay within a half, and meshes, dropout and microbatches treat rows as usual. Losses
and metrics match TRL 1.16, as means over pairs. As there, KTO's divergence and ORPO's mean over
tokens are computed per microbatch.

Shape letters: B batch, L length, P the two halves of a row, D model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import softplus
from ml_collections import ConfigDict

from lm.data.batches import Arrays
from lm.data.files import tell_once
from lm.data.record_store import Record, RecordStore
from lm.data.tokenizer import Tokenizer
from lm.errors import UserError
from lm.models.frozen import REFERENCE, reference_of
from lm.objectives.losses import token_losses
from lm.objectives.objective import (
    Batch,
    BoundModel,
    LossSums,
    Objective,
    OwnMean,
    Shapes,
)

HALVES = 2


class LogProbs(NamedTuple):
    """Log-probabilities of completions [B, P] that a loss compares, float32.

    Attributes:
        policy_BP: log-probabilities under the model, sums or means over tokens.
        reference_BP: log-probabilities under the frozen reference; 0 without one.
        label_B: 1 if the first completion is desirable, else 0; None for pairs.
        weights_B: 1 for a pair, 0 for padding.
        prompt_nll: mean negative log-likelihood per token of prompt and first completion.
    """

    policy_BP: jax.Array
    reference_BP: jax.Array
    label_B: jax.Array | None
    weights_B: jax.Array
    prompt_nll: jax.Array

    @property
    def ratios_BP(self) -> jax.Array:
        """Log-ratio of model to reference probability."""
        return self.policy_BP - self.reference_BP

    @property
    def margin_B(self) -> jax.Array:
        """Log-ratio of the first completion minus that of the second."""
        return self.ratios_BP[:, 0] - self.ratios_BP[:, 1]

    @property
    def kl(self) -> jax.Array:
        """Estimate of the KL divergence from the reference, from completions of other prompts."""
        ratios_B = jax.lax.stop_gradient(self.ratios_BP[:, 1])
        n = jnp.maximum(self.weights_B.sum(), 1)
        return jnp.maximum((ratios_B * self.weights_B).sum() / n, 0)

    def divided_by(self, lengths_BP: jax.Array) -> LogProbs:
        """Return the log-probabilities divided by token counts."""
        return self._replace(
            policy_BP=self.policy_BP / lengths_BP, reference_BP=self.reference_BP / lengths_BP
        )

    def metrics(self, beta: float) -> dict[str, Any]:
        """Return metrics as sums over pairs, or over the completions with each label."""
        weights_B, rewards_BP = self.weights_B, beta * self.ratios_BP
        if self.label_B is None:
            found = pair_metrics(rewards_BP) | _by_completion("logp", self.policy_BP)
            return {name: (value_B * weights_B).sum() for name, value_B in found.items()}
        labels_BP = jnp.stack([self.label_B, 1 - self.label_B], axis=1) * weights_B[:, None]
        figures = _by_completion("reward", rewards_BP[:, :1] * labels_BP)
        figures |= _by_completion("logp", self.policy_BP[:, :1] * labels_BP)
        n_chosen, n_rejected = labels_BP.sum(0)
        n = {"chosen": n_chosen, "rejected": n_rejected}
        means = {
            name: OwnMean(x_B.sum(), n[name.rpartition("_")[2]]) for name, x_B in figures.items()
        }
        return {**means, "kl": self.kl * weights_B.sum()}


def pair_metrics(rewards_BP: jax.Array) -> dict[str, jax.Array]:
    """Return per-pair metrics [B] from the rewards of pairs."""
    margin_B = rewards_BP[:, 0] - rewards_BP[:, 1]
    found = {"reward_margin": margin_B, "accuracy": (margin_B > 0).astype(jnp.float32)}
    return found | _by_completion("reward", rewards_BP)


def _by_completion(name: str, x_BP: jax.Array) -> dict[str, jax.Array]:
    return {f"{name}_chosen": x_BP[:, 0], f"{name}_rejected": x_BP[:, 1]}


Loss = Callable[[LogProbs, Any], jax.Array]


def dpo(scores: LogProbs, options: Any) -> jax.Array:
    """Return the loss of DPO (Rafailov et al. 2023, eq. 7), smoothed as cDPO's (Mitchell 2023)."""
    return _preferred(options.beta * scores.margin_B, options.label_smoothing)


def ipo(scores: LogProbs, options: Any) -> jax.Array:
    """Return the loss of IPO (Azar et al. 2023, eq. 17)."""
    return (scores.margin_B - 1 / (2 * options.beta)) ** 2


def simpo(scores: LogProbs, options: Any) -> jax.Array:
    """Return the loss of SimPO (Meng et al. 2024, eq. 6)."""
    logits_B = options.beta * scores.margin_B - options.simpo_gamma
    return _preferred(logits_B, options.label_smoothing)


def orpo(scores: LogProbs, options: Any) -> jax.Array:
    """Return the loss of ORPO (Hong et al. 2024, eq. 6)."""
    # The odds of a probability of 1 are infinite: clip to the next smaller float32.
    policy_BP = jnp.minimum(scores.policy_BP, -1e-7)
    log_odds_BP = policy_BP - jnp.log(-jnp.expm1(policy_BP))
    ratio_B = softplus(log_odds_BP[:, 1] - log_odds_BP[:, 0])
    return scores.prompt_nll + options.beta * ratio_B


def kto(scores: LogProbs, options: Any) -> jax.Array:
    """Return the loss of KTO (Ethayarajh et al. 2024, eq. 7)."""
    assert scores.label_B is not None
    sign_B = 2 * scores.label_B - 1
    values_B = jax.nn.sigmoid(options.beta * sign_B * (scores.ratios_BP[:, 0] - scores.kl))
    weight_B = jnp.where(sign_B > 0, options.desirable_weight, options.undesirable_weight)
    return weight_B * (1 - values_B)


def _preferred(logits_B: jax.Array, label_smoothing: float) -> jax.Array:
    """Return the label-smoothed cross-entropy of the first completion being better."""
    smoothed = label_smoothing * softplus(logits_B) if label_smoothing else 0.0
    return (1 - label_smoothing) * softplus(-logits_B) + smoothed


class PreferenceKind(NamedTuple):
    """Kind of preference loss.

    Attributes:
        loss: loss of each pair.
        has_reference: whether it uses a frozen reference.
        normalization: how token log-probabilities are reduced, "sum" or "mean".
    """

    loss: Loss
    has_reference: bool
    normalization: str


PREFERENCES: Mapping[str, PreferenceKind] = {
    "dpo": PreferenceKind(dpo, has_reference=True, normalization="sum"),
    "ipo": PreferenceKind(ipo, has_reference=True, normalization="mean"),
    "kto": PreferenceKind(kto, has_reference=True, normalization="sum"),
    "orpo": PreferenceKind(orpo, has_reference=False, normalization="mean"),
    "simpo": PreferenceKind(simpo, has_reference=False, normalization="mean"),
}


class Example(NamedTuple):
    """Record of a store: store, row, and the reference log-probabilities [P]."""

    store: RecordStore
    row: int
    reference: np.ndarray | None

    @property
    def record(self) -> Record:
        """Record itself."""
        return self.store[self.row]

    @property
    def previous(self) -> Record:
        """Previous record; for the first record, the last one."""
        return self.store[(self.row or len(self.store)) - 1]


@dataclass(frozen=True, eq=False)
class PreferenceExamples:
    """Examples of a store, in order.

    Attributes:
        store: records whose prompts leave room for a completion.
        reference: reference log-probabilities [n, P], or None.
    """

    store: RecordStore
    reference: np.ndarray | None

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> Example:
        return Example(self.store, index, None if self.reference is None else self.reference[index])


@dataclass(frozen=True)
class Preferences(Objective[RecordStore, Example]):
    """Preference of chosen over rejected completions.

    Sequences longer than L + 1 tokens are truncated at the end; records whose prompts leave no room
    for a completion are dropped, with one message.

    Attributes:
        name: kind of loss, a key of `PREFERENCES`.
        length: number L of tokens of prompt and completion that targets are predicted from.
        options: section "objective" of the configuration.
        precomputed: reference log-probabilities [n, P] by `reference_key`, if computed before
            training.
    """

    families: ClassVar = ("decoder",)
    columns: ClassVar = ("chosen", "rejected")
    has_perplexity: ClassVar = False

    name: str
    length: int
    options: Any
    precomputed: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False)

    @classmethod
    def from_config(cls, config: ConfigDict, tokenizer: Tokenizer | None) -> Preferences:
        return cls(config.objective.name, config.data.sequence_length, config.objective)

    @classmethod
    def attention_lengths(cls, config: ConfigDict) -> dict[str, int]:
        lengths = super().attention_lengths(config)
        return {f"twice {key}": HALVES * length for key, length in lengths.items()}

    @property
    def kind(self) -> PreferenceKind:
        """Kind of the loss."""
        return PREFERENCES[self.name]

    @property
    def reference_from(self) -> str:
        """Source of reference log-probabilities: `objective.reference`, or "none"."""
        return self.options.reference if self.kind.has_reference else "none"

    @property
    def precomputes(self) -> bool:  # type: ignore[override]
        return self.reference_from == "precomputed"

    def with_reference(self, source: str) -> Preferences:
        """Return a copy with another `objective.reference`."""
        options = copy(self.options)
        options.reference = source
        return replace(self, options=options)

    @property
    def frozen(self) -> tuple[str, ...]:  # type: ignore[override]
        return (REFERENCE,) if self.reference_from == "beside" else ()

    @property
    def shapes(self) -> Shapes:
        names, row = ("inputs", "targets", "segment_ids", "positions"), (HALVES * self.length,)
        shapes = {**dict.fromkeys(names, (row, "int32")), "weights": (row, "float32")}
        known = {"reference": ((HALVES,), "float32")} if self.precomputes else {}
        return {**shapes, **known}

    # --- data

    def examples(self, store: RecordStore, training: bool) -> PreferenceExamples:
        """Return the records whose prompts leave room for a completion."""
        self.require_columns(store)
        fits = store.lengths("prompt") <= self.length
        if not fits.any():
            raise UserError(
                f"{store.manifest.source}: every prompt has more tokens than "
                f"--config.data.sequence_length={self.length}"
            )
        if n := int((~fits).sum()):
            left_out = f"skipped {n} of {len(store)} records, whose prompts fill a sequence"
            tell_once(left_out, store.manifest.source)
        reference = None
        if self.precomputes:
            reference = self.precomputed.get(reference_key(store))
            if reference is None:
                raise UserError(
                    f"{store.manifest.source}: reference log-probabilities were not computed "
                    "before training (--config.objective.reference=precomputed)"
                )
        return PreferenceExamples(store.select(np.flatnonzero(fits)), reference)

    def features(self, example: Example, rng: np.random.Generator) -> Arrays:
        """Return arrays [2L] with each half padded; weights are 1 for completion tokens."""
        arrays = {name: np.zeros(*shape) for name, shape in self.shapes.items()}
        for half, (prompt, completion) in enumerate(self.sequences(example)):
            tokens = np.concatenate([prompt, completion])[: self.length + 1]
            n, start = len(tokens) - 1, half * self.length
            row = slice(start, start + n)
            arrays["inputs"][row], arrays["targets"][row] = tokens[:-1], tokens[1:]
            arrays["segment_ids"][row], arrays["positions"][row] = half + 1, np.arange(n)
            arrays["weights"][start + max(len(prompt) - 1, 0) : start + n] = 1
        if "reference" in arrays:
            arrays["reference"][:] = example.reference
        return arrays

    def sequences(self, example: Example) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """Return prompt and completion for each half of a row."""
        tokens = example.record.tokens
        return tuple((tokens["prompt"], tokens[name]) for name in ("chosen", "rejected"))

    # --- model

    def predict(self, model: BoundModel, batch: Batch) -> jax.Array:
        """Return the summed log-probabilities [B, P] of the completions."""
        return self._log_probs(model, batch)[0]

    def _log_probs(self, model: BoundModel, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Return `predict`, and the mean negative log-likelihood of tokens in first halves."""
        x_BLD = model.hidden(batch["inputs"], batch["positions"], batch["segment_ids"])
        nll_BL = token_losses(model, x_BLD, batch["targets"]).loss_BL
        first_BL = batch["segment_ids"] == 1
        mean = jnp.where(first_BL, nll_BL, 0).sum() / jnp.maximum(first_BL.sum(), 1)
        return -in_halves(nll_BL * batch["weights"]).sum(-1), mean

    def loss(self, model: BoundModel, batch: Batch) -> LossSums:
        """Return loss and metrics of each pair."""
        lengths_BP = in_halves(batch["weights"]).sum(-1)
        weights_B = (lengths_BP[:, 0] > 0).astype(jnp.float32)
        sums_BP, nll = self._log_probs(model, batch)
        reference_BP = self._reference_log_probs(model, batch)
        sums = LogProbs(sums_BP, reference_BP, batch.get("label"), weights_B, nll)
        loss, metrics = self.compare(sums, lengths_BP)
        return LossSums(loss, weights_B.sum(), metrics)

    def compare(self, sums: LogProbs, lengths_BP: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """Return the summed loss and summed metrics.

        Args:
            sums: summed log-probabilities of completions.
            lengths_BP: completion lengths in tokens.
        """
        asked = self.options.loss_normalization
        means = (self.kind.normalization if asked == "auto" else asked) == "mean"
        scores = sums.divided_by(jnp.maximum(lengths_BP, 1)) if means else sums
        loss_B = self.kind.loss(scores, self.options)
        # As in TRL, rewards are sums; without a reference, they are the compared values.
        metrics = (sums if self.kind.has_reference else scores).metrics(self.options.beta)
        return (loss_B * sums.weights_B).sum(), metrics

    def _reference_log_probs(self, model: BoundModel, batch: Batch) -> jax.Array:
        if self.reference_from == "beside":
            return jax.lax.stop_gradient(self.predict(reference_of(model), batch))
        if self.precomputes:
            return batch["reference"]
        return jnp.zeros((len(batch["inputs"]), HALVES), jnp.float32)


@dataclass(frozen=True)
class UnpairedPreferences(Preferences):
    """Preference of desirable over undesirable completions.

    The second half of a row pairs the prompt with the completion of the previous record, which is
    used to estimate the divergence from the reference.
    """

    columns: ClassVar = ("completion", "label")

    @property
    def shapes(self) -> Shapes:
        return {**super().shapes, "label": ((), "float32")}

    def features(self, example: Example, rng: np.random.Generator) -> Arrays:
        """Return the features of `Preferences` and the label, 1 if desirable."""
        label = np.asarray(example.record.raw["label"], np.float32)
        return {**super().features(example, rng), "label": label}

    def sequences(self, example: Example) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """Return the prompt with its own completion, and with that of another record."""
        tokens, other = example.record.tokens, example.previous.tokens
        return tuple((tokens["prompt"], made["completion"]) for made in (tokens, other))


def reference_key(store: RecordStore) -> str:
    """Return a key for the selected records of a store."""
    rows = hashlib.sha256(store.rows.tobytes()).hexdigest()[:16]
    return f"{store.directory.name}-{rows}"


def in_halves(x_BL: jax.Array) -> jax.Array:
    """Split rows into halves, [B, P, …]."""
    return x_BL.reshape(len(x_BL), HALVES, -1, *x_BL.shape[2:])
