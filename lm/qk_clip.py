"""QK-clip: scale down the query and key weights of heads with large attention logits.

Part of MuonClip (Kimi Team 2025, arXiv 2507.20534, §2.1, Algorithm 1); works with any optimizer. A
training step records the largest logit S of each head in model state. After the update the logits
of heads with S above the threshold τ are multiplied by γ = τ / S: queries and keys by √γ each, but
where heads share keys (grouped heads, the rotated key of latent attention) the queries alone by γ.

Shape letters: B batch, L query length, S key length, H heads, G key/value heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.kernels.dot_product_attention import NEG_INF, AttentionMask
from lm.models.attention import DotProductAttention
from lm.models.latent_attention import LatentAttention
from lm.models.variables import MODEL_STATE, Params, flat, nested
from lm.objectives.objective import Batch, LossSums
from lm.train_step import Between, Carry, Metrics, ModelState, Steps, TrainState

LARGEST = "largest_logits"  # variable of an attention module's model state, [H]
_QUERIES = 512  # queries per chunk of scores


@dataclass(frozen=True)
class ClippedSteps(Steps):
    """Steps that clip heads after the update.

    The largest logits are over all microbatches and devices; evaluation and decoding compute none.

    Attributes:
        threshold: τ.
    """

    threshold: float

    def init(self, batch: Batch) -> tuple[Params, Carry, ModelState]:
        """Initialize the variables, with a largest logit of 0 for each head."""
        with nn.intercept_methods(_record):
            return super().init(batch)

    def _loss(
        self, params: Params, before: Between, batch: Batch, rng: jax.Array | None
    ) -> tuple[LossSums, Between]:
        with nn.intercept_methods(_record):
            return super()._loss(params, before, batch, rng)

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Update, clip, and reset the largest logits; their maximum is a metric."""
        after, metrics = super().train_step(state, batch)
        logits = {p: x for p, x in flat(after.model_state).items() if is_largest_logits(p)}
        rotated = self.model.config.head_dim  # type: ignore[attr-defined]
        clipped = nested(clip(flat(after.params), logits, self.threshold, rotated))
        params = self._join(self.split(clipped)[0], self.split(after.params)[1])
        seen = jnp.concatenate([x.ravel() for x in logits.values()])
        metrics |= {"largest_logit": seen.max(), "clipped_heads": (seen > self.threshold).mean()}
        rest = flat(after.model_state) | jax.tree.map(jnp.zeros_like, logits)
        return replace(after, params=params, model_state=nested(rest)), metrics


def clipped_steps(steps: Steps, threshold: float) -> ClippedSteps:
    """Return steps that clip logits above a threshold (`--config.optimizer.qk_clip`)."""
    own = {field.name: getattr(steps, field.name) for field in fields(steps)}
    return ClippedSteps(**own, threshold=threshold)


# --- logits of a step


def is_largest_logits(path: str) -> bool:
    """Return whether a path is a largest-logits variable, which is 0 between steps."""
    return path.endswith(f"/{LARGEST}")


def _record(method: Callable, args: Any, options: Any, context: Any) -> Any:
    """Record the largest attention logits; for `nn.intercept_methods`."""
    module = context.module
    attends = isinstance(module, DotProductAttention | LatentAttention)
    if attends and context.method_name == "_attend" and module.is_mutable_collection(MODEL_STATE):
        q_BLHK, (k_BSGK, _), mask = args[:3]
        if module.is_initializing():
            zeros = jnp.zeros(q_BLHK.shape[2])
            module.put_variable(MODEL_STATE, LARGEST, nn.Partitioned(zeros, ("heads",)))
        else:
            scale = getattr(module, "score_scale", module.config.score_scale)
            found_H = scale * largest_logits(q_BLHK, k_BSGK, mask)
            before_H = module.get_variable(MODEL_STATE, LARGEST)
            module.put_variable(MODEL_STATE, LARGEST, jnp.maximum(before_H, found_H))
    return method(*args, **options)


def largest_logits(q_BLHK: jax.Array, k_BSGK: jax.Array, mask: AttentionMask) -> jax.Array:
    """Return the largest attention logit of each head over visible keys, [H] float32.

    It has no gradient. The products are computed separately from the attention kernel.

    Args:
        q_BLHK: queries.
        k_BSGK: keys.
        mask: visible keys; queries of segment 0 (padding) are ignored.
    """
    q_BLHK, k_BSGK = jax.lax.stop_gradient((q_BLHK, k_BSGK))
    (B, L, H, K), (S, G) = q_BLHK.shape, k_BSGK.shape[1:3]
    visible_BLS = mask.materialize(L, S)
    if visible_BLS is None:
        visible_BLS = jnp.ones((1, L, S), bool)
    if mask.segments_BL is not None:
        visible_BLS &= (mask.segments_BL != 0)[:, :, None]
    size = next(n for n in range(min(L, _QUERIES), 0, -1) if L % n == 0)

    def chunk_maximum(first: jax.Array | int) -> jax.Array:
        q_BPHK, visible_BPS = (
            jax.lax.dynamic_slice_in_dim(x, first, size, 1) for x in (q_BLHK, visible_BLS)
        )
        q_BPGRK = q_BPHK.reshape(B, size, G, H // G, K)
        scores_BGRPS = jnp.einsum(
            "BPGRK,BSGK->BGRPS", q_BPGRK, k_BSGK, preferred_element_type=jnp.float32
        )
        scores_BGRPS = jnp.where(visible_BPS[:, None, None], scores_BGRPS, NEG_INF)
        return scores_BGRPS.max((0, 3, 4)).reshape(H)

    return jax.lax.map(chunk_maximum, jnp.arange(0, L, size)).max(0)


# --- weights


def clip(
    params: dict[str, jax.Array],
    logits: dict[str, jax.Array],
    threshold: float,
    rotated: int,
) -> dict[str, jax.Array]:
    """Return parameters with heads scaled so that no logit exceeds a threshold.

    Args:
        params: parameters by path.
        logits: largest logits [..., H] of attention modules, by the path of the variable.
        threshold: τ.
        rotated: for latent attention, number of dimensions per head that RoPE rotates (the last).
    """
    changed = dict(params)
    for path, logits_H in logits.items():
        module = path.removesuffix(LARGEST)
        gamma_H1 = (threshold / jnp.maximum(logits_H, threshold))[..., None]
        kernels = {
            name: changed[f"{module}{name}/kernel"]
            for name in ("query", "key", "up")
            if f"{module}{name}/kernel" in changed
        }
        for name, factors_HK in _factors(kernels, gamma_H1, rotated).items():
            changed[f"{module}{name}/kernel"] = kernels[name] * factors_HK[..., None, :, :]
            if (bias := f"{module}{name}/bias") in changed:
                changed[bias] = changed[bias] * factors_HK
    return changed


def _factors(
    kernels: dict[str, jax.Array], gamma_H1: jax.Array, rotated: int
) -> dict[str, jax.Array]:
    """Return factors [..., H, K or 1] for the heads of kernels [..., inputs, H, K], by name.

    Args:
        kernels: linear maps of an attention module, by name.
        gamma_H1: factors of the logits, [..., H, 1].
        rotated: as in `clip`.
    """
    root_H1 = jnp.sqrt(gamma_H1)
    if "up" not in kernels:
        if kernels["key"].shape[-2] == kernels["query"].shape[-2]:
            return {"query": root_H1, "key": root_H1}
        return {"query": gamma_H1}
    n_own = kernels["query"].shape[-1] - rotated
    is_own_K, is_key_K = (jnp.arange(kernels[x].shape[-1]) < n_own for x in ("query", "up"))
    return {
        "query": jnp.where(is_own_K, root_H1, gamma_H1),
        "up": jnp.where(is_key_K, root_H1, 1),
    }
