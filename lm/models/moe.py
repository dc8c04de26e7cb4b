"""A feed-forward layer of experts, of which each token uses a few.

Switch (Fedus et al. 2021), Mixtral (Jiang et al. 2024) and ST-MoE's z-loss (Zoph et al. 2022).
Shape letters: B batch, L length, D model, F feed-forward, E experts, K choices of a token.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.kernels.dense import ACTIVATIONS, GATED
from lm.models import routing
from lm.models.transformer_config import TransformerConfig
from lm.models.variables import Initializer, Kind, Role, add_loss, param, report
from lm.parallel.experts import ExpertMatmul, ExpertParams, Routing, mixture_of_experts
from lm.parallel.sharding import constrain


class MixtureOfExperts(nn.Module):
    """Σ weight · FeedForward_expert(x) over the experts that the router chooses for a token.

    In training an expert with a capacity takes the first tokens of a row and those after them get
    0; otherwise nothing is dropped, so that decoding equals the full forward pass. Reports, of each
    row: the balance and z-losses, the part of the choices that were dropped, and the busiest
    expert's load over the even share.
    """

    config: TransformerConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x_BLD: jax.Array, is_token_BL: jax.Array | None = None) -> jax.Array:
        """[B, L, D]; what is no token (padding) is sent to no expert."""
        c = self.config
        if is_token_BL is None:
            is_token_BL = jnp.ones(x_BLD.shape[:2], bool)
        jitter = 0.0 if self.deterministic else c.router_jitter
        logits_BLE = Router(c, jitter, name="router")(x_BLD)
        experts_BLK, weights_BLK = routing.choose(logits_BLE, c.experts_per_token)
        load_BE = routing.load(experts_BLK, is_token_BL, c.n_experts)

        room = 0
        if not self.deterministic and c.expert_capacity:
            room = routing.capacity(
                c.expert_capacity, x_BLD.shape[1], c.experts_per_token, c.n_experts
            )
        experts_BLK = jnp.where(is_token_BL[..., None], experts_BLK, c.n_experts)
        places_BLK = routing.places(experts_BLK, c.n_experts) if room else experts_BLK
        is_served_BLK = places_BLK < (room or c.n_experts)
        experts_BLK = jnp.where(is_served_BLK, experts_BLK, c.n_experts)

        balance_B = routing.balance_loss(logits_BLE, load_BE, is_token_BL)
        z_B = routing.z_loss(logits_BLE, is_token_BL)
        add_loss(self, "auxiliary", c.balance_loss * balance_B + c.router_z_loss * z_B)
        report(self, "balance_loss", balance_B)
        report(self, "router_z_loss", z_B)
        report(self, "busiest_expert", load_BE.max(-1) * c.n_experts)
        served_BL1 = is_served_BLK.mean(-1, keepdims=True, dtype=jnp.float32)
        report(self, "dropped", routing.mean(1 - served_BL1, is_token_BL)[:, 0])

        routes = Routing(experts_BLK, places_BLK, weights_BLK)
        return Experts(c, name="experts")(x_BLD, routes, room)


class Router(nn.Module):
    """Scores of the experts, [B, L, E], in float32 throughout (Switch, §2.4)."""

    config: TransformerConfig
    jitter: float

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        c = self.config
        init = c.kernel_init(c.output_std(c.n_experts, x_BLD.shape[-1]))
        # Small enough to be whole on every device: gathering it would cost more than it saves.
        shape, names = (x_BLD.shape[-1], c.n_experts), ("router_inputs", "router")
        role = Role(Kind.ROUTER, c.stream, inputs=1)
        kernel_DE = param(self, "kernel", init, shape, names, role)
        x_BLD = x_BLD.astype(jnp.float32) / c.width_ratio
        if self.jitter:
            low, high = 1 - self.jitter, 1 + self.jitter
            x_BLD *= jax.random.uniform(
                self.make_rng("dropout"), x_BLD.shape, minval=low, maxval=high
            )
        # A TPU's default product of float32 numbers rounds them to bfloat16.
        logits_BLE = jnp.matmul(x_BLD, kernel_DE, precision=jax.lax.Precision.HIGHEST)
        return constrain(logits_BLE, "batch", "length", "router")


class Experts(nn.Module):
    """Feed-forward layers side by side; kernels are [E, inputs, outputs]."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BLD: jax.Array, routes: Routing, capacity: int) -> jax.Array:
        c = self.config
        parameters: dict[str, jax.Array] = {}
        names: dict[str, tuple[str, ...]] = {}
        role = Role(Kind.MATRIX, c.stream, expert=True, inputs=1)
        wide = ("gate", "in") if c.activation in GATED else ("in",)
        for name in (*wide, "out"):
            inner = name != "out"
            axes = ("experts", "embed", "mlp") if inner else ("experts", "mlp", "embed")
            shape = (x_BLD.shape[-1], c.d_ff) if inner else (c.d_ff, c.d_model)
            init = c.kernel_init(c.std(*shape) if inner else c.residual_std(*shape))
            made = ExpertLinear((c.n_experts, *shape), axes, role, c.bias, init, name=name)()
            for kind, (value, names_of_axes) in made.items():
                parameters[f"{name}/{kind}"] = value
                names[f"{name}/{kind}"] = names_of_axes
        x_BLD = x_BLD.astype(c.dtype)
        y_BLD = mixture_of_experts(self._feed_forward, parameters, names, x_BLD, routes, capacity)
        return y_BLD.astype(c.dtype)

    def _feed_forward(self, p: ExpertParams, x: jax.Array, product: ExpertMatmul) -> jax.Array:
        def linear(name: str, x: jax.Array) -> jax.Array:
            return product(x, p[f"{name}/kernel"], p.get(f"{name}/bias"))

        act = ACTIVATIONS[self.config.activation]
        gated = self.config.activation in GATED
        h = act(linear("gate", x)) * linear("in", x) if gated else act(linear("in", x))
        return linear("out", h)


class ExpertLinear(nn.Module):
    """The parameters of a linear map for each expert, with the names of their axes."""

    shape: tuple[int, int, int]
    names: tuple[str, str, str]
    role: Role
    use_bias: bool
    kernel_init: Initializer

    @nn.compact
    def __call__(self) -> dict[str, tuple[jax.Array, tuple[str, ...]]]:
        zeros = nn.initializers.zeros
        E, _, F = self.shape
        outer, _, inner = self.names
        kernel = param(self, "kernel", self.kernel_init, self.shape, self.names, self.role)
        made: dict[str, tuple[jax.Array, tuple[str, ...]]] = {"kernel": (kernel, self.names)}
        if self.use_bias:
            bias = param(self, "bias", zeros, (E, F), (outer, inner), self.role.bias())
            made["bias"] = bias, (outer, inner)
        return made
