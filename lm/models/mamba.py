"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, §7): a token mixer with a cache of constant size.

Each head is a recurrence of `lm/kernels/state_space.py`, whose inputs pass through a short causal
convolution. A cache holds the last inputs of the convolution and the states. `gated_delta.py` is
the same with another recurrence.

Shape letters: B batch, L query length, D model, W width of the input, H heads, P head dim,
G groups of heads, N state, K taps of the convolution, M = K - 1 + L.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lm.config.registries import MambaOptions
from lm.kernels.elementwise import ACTIVATIONS
from lm.kernels.state_space import state_space
from lm.models.attention import MixerInputs, TokenMixer
from lm.models.cache import Layer, write_layer
from lm.models.layers import Linear
from lm.models.transformer_config import TransformerConfig
from lm.models.variables import Kind, Role, param
from lm.parallel.mesh import constrain

SHORTEST_STEP, LONGEST_STEP = 1e-3, 0.1  # initial values, as in the paper's code
FASTEST_DECAY = 16.0
OF_HEADS, OF_GROUPS = ("heads", "head_dim"), ("kv_heads", "head_dim")  # logical axes


@flax.struct.dataclass
class MambaCache:
    """State of a layer, or of several on a first axis.

    Attributes:
        taps: the last K - 1 inputs of the convolution, [B, K - 1, H or G, P or N], by name.
        state: states of the heads, [B, H, P, N], float32.
        segment: segment of the last token, [B]; 0: no token yet.
    """

    taps: dict[str, jax.Array]
    state: jax.Array
    segment: jax.Array


@flax.struct.dataclass
class RecurrenceInputs:
    """Inputs of a recurrence.

    Attributes:
        x_BLW: tokens.
        convolved: convolved inputs, [B, L, H, P] and twice [B, L, G, N], float32.
        dt_BLH: step sizes, 0 for padding.
        is_token_BL1: false for padding.
        ids_BL: numbers of texts, from `_number_texts`.
        state_BHPN: states before the first token.
    """

    x_BLW: jax.Array
    convolved: list[jax.Array]
    dt_BLH: jax.Array
    is_token_BL1: jax.Array
    ids_BL: jax.Array
    state_BHPN: jax.Array


class StateSpaceMixer(TokenMixer):
    """Projections, convolution, recurrence, and a gated norm of the outputs.

    Three inputs are convolved: one of all heads, and two of groups of heads. A subclass defines the
    recurrence and the norm.
    """

    INPUTS: ClassVar[tuple[str, str, str]]

    @classmethod
    def head_widths(cls, model: Any) -> tuple[int, int]:
        """Return the widths for the attention layers, if there are any."""
        return (model.head_dim, model.head_dim) if model.attention_layers else (0, 0)

    @classmethod
    def sizes(cls, options: MambaOptions) -> dict[str, tuple[int, int]]:
        """Return the number of heads and their width for each input."""
        heads, group = (
            (options.ssm_heads, options.ssm_head_dim),
            (options.ssm_groups, options.ssm_state),
        )
        return dict(zip(cls.INPUTS, (heads, group, group), strict=True))

    @classmethod
    def init_cache(
        cls, config: TransformerConfig, n_layers: int, batch: int, length: int
    ) -> MambaCache:
        """Return the state before any token; `length` has no effect."""
        o, leading = config.mixer_options, (n_layers, batch)
        taps = {
            name: jnp.zeros((*leading, o.ssm_conv - 1, *size), config.dtype)
            for name, size in cls.sizes(o).items()
        }
        state = jnp.zeros((*leading, o.ssm_heads, o.ssm_head_dim, o.ssm_state))
        return MambaCache(taps, state, jnp.zeros(leading, jnp.int32))

    def setup(self) -> None:
        c, o = self.config, self.config.mixer_options
        sizes, vector = self.sizes(o), Role(Kind.BIAS, c.stream)
        heads, *_ = sizes.values()
        axes = dict(zip(self.INPUTS, (OF_HEADS, OF_GROUPS, OF_GROUPS), strict=True))
        self.gate = self.linear(heads, *OF_HEADS)
        self.inputs = {name: self.linear(size, *axes[name]) for name, size in sizes.items()}
        self.step = self.linear(heads[:1], "heads")
        self.convolutions = {
            name: Convolution(size, o, axes[name], vector) for name, size in sizes.items()
        }
        self.decay = self.of_heads("log_decay", _log_decays)
        self.step_bias = self.of_heads("step_bias", _step_biases)
        out = c.kernel_init(c.residual_std(int(np.prod(heads)), c.d_model))
        names, role = (*OF_HEADS, "embed"), Role(Kind.MATRIX, c.stream)
        self.output = Linear(heads, (c.d_model,), names, role, o.ssm_bias, out, c.dtype)

    def linear(self, shape: tuple[int, ...], *names: str) -> Linear:
        """Build a projection of the tokens to `shape`, whose logical axes are `names`."""
        c = self.config
        init = c.kernel_init(c.std(self.width, int(np.prod(shape))))
        names, role = ("embed", *names), Role(Kind.MATRIX, c.stream)
        return Linear((self.width,), shape, names, role, c.mixer_options.ssm_bias, init, c.dtype)

    def of_heads(self, name: str, init: Any) -> jax.Array:
        """Create a parameter with one number per head."""
        n = (self.config.mixer_options.ssm_heads,)
        return param(self, name, init, n, ("heads",), Role(Kind.BIAS, self.config.stream))

    def __call__(
        self, x_BLW: jax.Array, inputs: MixerInputs, cache: Any, layer: Layer | None
    ) -> tuple[jax.Array, Any]:
        """Update the states with these tokens; padding leaves them unchanged."""
        c, o = self.config, self.config.mixer_options
        if cache is None:
            own = jax.tree.map(lambda x: x[0], self.init_cache(c, 1, x_BLW.shape[0], 0))
        else:
            own = jax.tree.map(lambda x: x[layer], cache)
        segments_BL = inputs.mask.segments_BL
        if segments_BL is None:
            segments_BL = jnp.ones(x_BLW.shape[:2], jnp.int32)
        ids_BL, is_token_BL, segment_B = _number_texts(segments_BL, own.segment)
        convolved, taps = [], {}
        for name in self.INPUTS:
            convolve = self.convolutions[name]
            x = constrain(self.inputs[name](x_BLW), "batch", "length", *convolve.names)
            y, taps[name] = convolve(x, own.taps[name], ids_BL, is_token_BL)
            convolved.append(y)
        is_token_BL1 = is_token_BL[..., None]
        dt_BLH = jax.nn.softplus(self.step(x_BLW).astype(jnp.float32) + self.step_bias)
        if o.ssm_step_low or o.ssm_step_high:
            dt_BLH = jnp.clip(dt_BLH, o.ssm_step_low, o.ssm_step_high or None)
        steps = dt_BLH * is_token_BL1, is_token_BL1
        y_BLHP, state = self.recur(RecurrenceInputs(x_BLW, convolved, *steps, ids_BL, own.state))
        y_BLHP = self.gated_norm(y_BLHP, self.gate(x_BLW).astype(jnp.float32))
        if cache is not None and layer is not None:
            cache, _ = write_layer(cache, layer, MambaCache(taps, state, segment_B))
        return self.output(y_BLHP.astype(c.dtype)), cache

    def recur(self, inputs: RecurrenceInputs) -> tuple[jax.Array, jax.Array]:
        """Return the outputs [B, L, H, P] and the states after the last token, float32."""
        raise NotImplementedError

    def gated_norm(self, y_BLHP: jax.Array, gate_BLHP: jax.Array) -> jax.Array:
        """Normalize the outputs, and multiply by the gate's SiLU; all float32."""
        raise NotImplementedError


class Mamba2(StateSpaceMixer):
    """Mamba-2: each token also adds its input to its output, and the norm is of gated outputs."""

    INPUTS = ("x", "B", "C")

    def setup(self) -> None:
        super().setup()
        self.skip = self.of_heads("skip", jax.nn.initializers.ones)
        o, norm = self.config.mixer_options, Role(Kind.NORM, self.config.stream)
        shape, ones = (o.ssm_heads, o.ssm_head_dim), jax.nn.initializers.ones
        self.scale = param(self, "scale", ones, shape, OF_HEADS, norm)

    def recur(self, inputs: RecurrenceInputs) -> tuple[jax.Array, jax.Array]:
        """Run the recurrence of `lm/kernels/state_space.py`."""
        x_BLHP, b_BLGN, c_BLGN = inputs.convolved
        y_BLHP, state = state_space(
            x_BLHP,
            inputs.dt_BLH,
            -jnp.exp(self.decay),
            b_BLGN,
            c_BLGN,
            inputs.ids_BL,
            inputs.state_BHPN,
            self.config.mixer_options.ssm_chunk,
        )
        return y_BLHP + self.skip[:, None] * x_BLHP, state

    def gated_norm(self, y_BLHP: jax.Array, gate_BLHP: jax.Array) -> jax.Array:
        """Multiply by the gate, and divide by the root mean square over the heads of each group."""
        y_BLHP = constrain(y_BLHP * jax.nn.silu(gate_BLHP), "batch", "length", *OF_HEADS)
        shape = y_BLHP.shape
        y = y_BLHP.reshape(*shape[:2], self.config.mixer_options.ssm_groups, -1, shape[-1])
        y *= jax.lax.rsqrt(jnp.square(y).mean((-2, -1), keepdims=True) + self.config.norm_eps)
        return y.reshape(shape) * self.scale


def _number_texts(
    segments_BL: jax.Array, segment_B: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Number the texts of each row: 0 continues the previous one, then 1, ….

    Args:
        segments_BL: segment ids, 0 for padding, which belongs to the text before it.
        segment_B: segment of the token before.

    Returns:
        Numbers [B, L], whether there is a token [B, L], and the segment of the last one [B].
    """
    is_token_BL = segments_BL != 0
    places_BL = jnp.where(is_token_BL, jnp.arange(1, segments_BL.shape[1] + 1), 0)
    filled_BL = jnp.take_along_axis(
        jnp.concatenate([segment_B[:, None], segments_BL], axis=1),
        jax.lax.cummax(places_BL, axis=1),
        axis=1,
    )
    before_BL = jnp.concatenate([segment_B[:, None], filled_BL[:, :-1]], axis=1)
    return jnp.cumsum(filled_BL != before_BL, axis=1), is_token_BL, filled_BL[:, -1]


class Convolution(nn.Module):
    """Convolution of each channel over the preceding tokens of its text, then an activation.

    Attributes:
        channels: number of heads and their width.
        options: options of the mixer; `ssm_conv` is the number of taps K.
        names: logical axes of the channels.
        role: role of the parameters.
    """

    channels: tuple[int, int]
    options: MambaOptions
    names: tuple[str, str]
    role: Role

    @nn.compact
    def __call__(
        self, x_BLHP: jax.Array, taps_BKHP: jax.Array, ids_BL: jax.Array, is_token_BL: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Convolve.

        Args:
            x_BLHP: inputs.
            taps_BKHP: the K - 1 inputs before the first.
            ids_BL: numbers of texts, from `_number_texts`.
            is_token_BL: false for padding.

        Returns:
            Outputs, float32, and the last K - 1 inputs of the last text.
        """
        L, K, bound = x_BLHP.shape[1], self.options.ssm_conv, self.options.ssm_conv**-0.5
        shape, axes, zeros = (*self.channels, K), (*self.names, "hidden"), nn.initializers.zeros
        kernel_HPK = param(self, "kernel", _uniform(-bound, bound), shape, axes, self.role)
        y_BLHP = jnp.zeros(self.channels)
        if self.options.ssm_conv_bias:
            y_BLHP = param(self, "bias", zeros, self.channels, self.names, self.role)
        x_BMHP = jnp.concatenate([taps_BKHP, x_BLHP.astype(taps_BKHP.dtype)], axis=1)
        ids_BM = jnp.pad(ids_BL, ((0, 0), (K - 1, 0)))
        for k in range(K):
            same_BL = ids_BM[:, k : k + L] == ids_BL
            y_BLHP += x_BMHP[:, k : k + L] * same_BL[..., None, None] * kernel_HPK[..., k]
        end_B1 = (is_token_BL * jnp.arange(1, L + 1)).max(1, keepdims=True)
        at_BK = end_B1 + jnp.arange(K - 1)
        last_BKHP = jnp.take_along_axis(x_BMHP, at_BK[..., None, None], axis=1)
        is_kept_BK = jnp.take_along_axis(ids_BM, at_BK, axis=1) == ids_BL[:, -1:]
        y_BLHP = ACTIVATIONS[self.options.ssm_activation](y_BLHP)
        return y_BLHP, jnp.where(is_kept_BK[..., None, None], last_BKHP, 0)


def _uniform(low: float, high: float) -> Any:
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, low, high)


def _log_decays(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, FASTEST_DECAY))


def _step_biases(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Draw step sizes uniformly on a logarithmic scale; return their inverse softplus."""
    low, high = np.log(SHORTEST_STEP), np.log(LONGEST_STEP)
    step = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
    return step + jnp.log(-jnp.expm1(-step))
