"""Replaced-token detection: detect tokens that a small generator substituted for masked ones.

ELECTRA (Clark et al. 2020, section 2). The generator is trained on masked language modeling; its
samples replace the masked tokens, and the discriminator predicts for each token whether it was
replaced.

Shape letters: B batch, L length, P predictions, D model, W width of the generator, V vocabulary.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lm.data.batches import Arrays, Example
from lm.data.tokenizer import Tokenizer
from lm.objectives.losses import token_loss
from lm.objectives.masked import Masked
from lm.objectives.objective import Batch, BoundModel, LossSums, Shapes


def sample_replacements(logits_BPV: jax.Array, seeds_B: jax.Array) -> jax.Array:
    """Sample tokens [B, P] from logits, with a separate seed per row."""
    shape = logits_BPV.shape[1:]
    noise_BPV = jax.vmap(lambda seed: jax.random.gumbel(jax.random.key(seed), shape))(seeds_B)
    return jnp.argmax(logits_BPV.astype(jnp.float32) + noise_BPV, axis=-1).astype(jnp.int32)


@dataclass(frozen=True, eq=False)
class ReplacedTokens(Masked):
    """Prediction of masked tokens by a generator, and detection of the replaced ones.

    Rows are those of `Masked`, with all predicted tokens masked. A token counts as replaced if the
    sample differs from it; no gradient flows through the sample. Sampling seeds are features, so
    that evaluation draws the same samples every time, on every mesh.

    Attributes:
        replaced_weight: weight of the discriminator's loss.
    """

    shares: ClassVar = (1.0, 1.0)

    _: KW_ONLY
    replaced_weight: float = 50.0

    @classmethod
    def from_config(cls, config: ConfigDict, tokenizer: Tokenizer | None) -> ReplacedTokens:
        made = super().from_config(config, tokenizer)
        assert isinstance(made, ReplacedTokens)
        return replace(made, replaced_weight=config.objective.replaced_weight)

    @property
    def shapes(self) -> Shapes:
        row = (self.length,), "int32"
        return {**super().shapes, "originals": row, "replaced_by": row, "seeds": ((), "int32")}

    def features(self, example: Example, rng: np.random.Generator) -> Arrays:
        """Return the features of `Masked` and the data to build the discriminator's inputs.

        These are originals [L], replaced_by [L] (1 + index of the prediction that replaces the
        token; 0 for unchanged tokens) and seeds [].
        """
        row = super().features(example, rng)
        originals, replaced_by = row["inputs"].copy(), np.zeros(self.length, np.int32)
        n = int(row["weights"].sum())
        at = row["masked_positions"][:n]
        originals[at], replaced_by[at] = row["targets"][:n], np.arange(1, n + 1)
        seed = np.asarray(rng.integers(2**31), np.int32)
        return row | {"originals": originals, "replaced_by": replaced_by, "seeds": seed}

    def loss(self, model: BoundModel, batch: Batch) -> LossSums:
        """Return the generator's cross-entropy plus the weighted discriminator's.

        The paper adds the mean over masked tokens and the mean over all tokens. Here a row's
        discriminator loss has the weight of its masked tokens: equivalent for equally full rows,
        and additive over parts of a batch.
        """
        positions_BL, segment_ids_BL = batch["positions"], batch["segment_ids"]
        targets_BP, weights_BP = batch["targets"], batch["weights"]
        x_BLW = model.generator_hidden(batch["inputs"], positions_BL, segment_ids_BL)
        x_BPW = jnp.take_along_axis(x_BLW, batch["masked_positions"][..., None], axis=1)
        settings = self.label_smoothing, self.z_loss
        sums = token_loss(model, x_BPW, targets_BP, weights_BP, *settings, of="generator_logits")

        logits_BPV = jax.lax.stop_gradient(model.generator_logits(x_BPW))
        samples_BP = sample_replacements(logits_BPV, batch["seeds"])
        padded_BP = jnp.pad(samples_BP, ((0, 0), (1, 0)))
        originals_BL, replaced_by_BL = batch["originals"], batch["replaced_by"]
        found_BL = jnp.take_along_axis(padded_BP, replaced_by_BL, axis=1)
        inputs_BL = jnp.where(replaced_by_BL > 0, found_BL, originals_BL)
        is_other_BL = (inputs_BL != originals_BL).astype(jnp.float32)

        scores_BL = model.replaced(model.hidden(inputs_BL, positions_BL, segment_ids_BL))
        loss_BL = jax.nn.softplus(scores_BL) - is_other_BL * scores_BL
        is_token_BL = (segment_ids_BL > 0).astype(jnp.float32)
        weights_BL = is_token_BL / jnp.maximum(is_token_BL.sum(-1, keepdims=True), 1)
        weights_BL *= weights_BP.sum(-1, keepdims=True)
        correct_BL = (scores_BL > 0) == (is_other_BL > 0)
        means = {
            "replaced_nll": (loss_BL * weights_BL).sum(),
            "replaced_accuracy": (correct_BL * weights_BL).sum(),
            "replaced_share": (is_other_BL * weights_BL).sum(),
        }
        loss = sums.loss + self.replaced_weight * means["replaced_nll"]
        return LossSums(loss, sums.weight, sums.metrics | means)
