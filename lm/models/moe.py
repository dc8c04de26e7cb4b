"""Mixture-of-experts feed-forward layer.

Switch (Fedus et al. 2021), Mixtral (Jiang et al. 2024), the shared expert of Qwen2-MoE (Yang et al.
2024) and ST-MoE's z-loss (Zoph et al. 2022).
Tokens of the same row share capacity and balance statistics, as in Mesh TensorFlow, so that
results depend neither on the mesh nor on the number of microbatches.

Shape letters: B batch, L length, D model, F feed-forward, E experts, K choices of a token.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.kernels.elementwise import ACTIVATIONS, GATED
from lm.models.expert_choice import choose_experts, router_probabilities
from lm.models.layers import FeedForward
from lm.models.model_state import model_state
from lm.models.sharded_experts import ExpertMatmul, ExpertParams, Routing, mixture_of_experts
from lm.models.transformer_config import TransformerConfig
from lm.models.variables import Initializer, Kind, Role, add_loss, add_metric, param
from lm.parallel.mesh import constrain


class MixtureOfExperts(nn.Module):
    """Sum of weight · FeedForward_expert(x) over the experts that the router chooses for a token.

    A shared expert, which every token uses, adds its output, times sigmoid(x w) if it has a gate
    (Qwen2, Yang et al. 2024, §2.2.2).

    In training an expert with a capacity takes the first tokens of a row, and later ones get 0;
    otherwise nothing is dropped, so that decoding equals the full forward pass. For each row it
    reports the balance and z-losses, the fraction of dropped choices, and the load of the busiest
    expert relative to an even load.
    """

    config: TransformerConfig
    deterministic: bool

    @nn.compact
    def __call__(self, x_BLD: jax.Array, is_token_BL: jax.Array | None = None) -> jax.Array:
        """Return [B, L, D]; padding, where `is_token_BL` is false, goes to no expert."""
        c = self.config
        if is_token_BL is None:
            is_token_BL = jnp.ones(x_BLD.shape[:2], bool)
        jitter = 0.0 if self.deterministic else c.router_jitter
        logits_BLE = Router(c, c.n_experts, jitter, c.router_bias, name="router")(x_BLD)
        bias = None
        if c.router_bias_rate:
            bias = model_state(self, "router_bias", jnp.zeros, (c.n_experts,), ("router",))
        bias_E = None if bias is None else bias.value
        experts_BLK, weights_BLK = choose_experts(c, logits_BLE, bias_E)
        if bias is not None:
            step_E = load_balancing_step(experts_BLK, is_token_BL, c.n_experts)
            bias.update(bias.value + c.router_bias_rate * step_E)
        load_BE = expert_load(experts_BLK, is_token_BL, c.n_experts)

        capacity = 0
        if not self.deterministic and c.expert_capacity:
            capacity = expert_capacity(
                c.expert_capacity, x_BLD.shape[1], c.experts_per_token, c.n_experts
            )
        experts_BLK = jnp.where(is_token_BL[..., None], experts_BLK, c.n_experts)
        positions_BLK = queue_positions(experts_BLK, c.n_experts) if capacity else experts_BLK
        is_served_BLK = positions_BLK < (capacity or c.n_experts)
        experts_BLK = jnp.where(is_served_BLK, experts_BLK, c.n_experts)

        shares_BLE = router_probabilities(c, logits_BLE)
        balance_B = balance_loss(shares_BLE, load_BE, is_token_BL)
        z_B = router_z_loss(logits_BLE, is_token_BL)
        add_loss(self, "auxiliary", c.balance_loss * balance_B + c.router_z_loss * z_B)
        add_metric(self, "balance_loss", balance_B)
        add_metric(self, "router_z_loss", z_B)
        add_metric(self, "busiest_expert", load_BE.max(-1) * c.n_experts)
        served_BL1 = is_served_BLK.mean(-1, keepdims=True, dtype=jnp.float32)
        add_metric(self, "dropped", masked_mean(1 - served_BL1, is_token_BL)[:, 0])

        routes = Routing(experts_BLK, positions_BLK, weights_BLK)
        experts = Experts(c, name="experts")
        if c.expert_weights_input:
            y_BLD = weighted_inputs(experts, x_BLD, routes, capacity)
        else:
            y_BLD = experts(x_BLD, routes, capacity)
        return y_BLD + self._shared_expert(x_BLD) if c.shared_expert_d_ff else y_BLD

    def _shared_expert(self, x_BLD: jax.Array) -> jax.Array:
        """Return the output of the shared expert, times its gate if it has one."""
        c = replace(self.config, d_ff=self.config.shared_expert_d_ff)
        y_BLD = FeedForward(c, self.deterministic, name="shared_expert")(x_BLD)
        if not c.shared_expert_gate:
            return y_BLD
        gate_BL1 = jax.nn.sigmoid(Router(c, 1, name="shared_expert_gate")(x_BLD))
        return (gate_BL1 * y_BLD).astype(y_BLD.dtype)


def weighted_inputs(
    experts: nn.Module, x_BLD: jax.Array, routes: Routing, capacity: int
) -> jax.Array:
    """Return the sum over experts of FeedForward_expert(weight · x) (Llama 4's released code).

    Each choice of a token is treated as a separate token.

    Args:
        experts: feed-forward layers, applied to tokens, routes and a capacity.
        x_BLD: tokens.
        routes: experts of each token.
        capacity: see `mixture_of_experts`.
    """
    B, L, K = routes.weights_BLK.shape
    x_BLKD = x_BLD[:, :, None] * routes.weights_BLK[..., None].astype(x_BLD.dtype)
    alone = routes._replace(weights_BLK=jnp.ones_like(routes.weights_BLK))
    alone = jax.tree.map(lambda x_BLK: x_BLK.reshape(B, L * K, 1), alone)
    y_BLD = experts(x_BLKD.reshape(B, L * K, -1), alone, capacity)
    return y_BLD.reshape(B, L, K, -1).sum(2)


class Router(nn.Module):
    """Router: logits of `n_outputs` experts, [B, L, E], in float32 throughout (Switch, §2.4)."""

    config: TransformerConfig
    n_outputs: int
    jitter: float = 0.0
    use_bias: bool = False

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        c = self.config
        init = c.kernel_init(c.output_std(self.n_outputs, x_BLD.shape[-1]))
        # Replicated: it is small, and gathering it would cost more than sharding saves.
        shape, names = (x_BLD.shape[-1], self.n_outputs), ("router_inputs", "router")
        role = Role(Kind.ROUTER, c.stream, inputs=1)
        kernel_DE = param(self, "kernel", init, shape, names, role)
        x_BLD = x_BLD.astype(jnp.float32) / c.width_ratio
        if self.jitter:
            low, high = 1 - self.jitter, 1 + self.jitter
            x_BLD *= jax.random.uniform(
                self.make_rng("dropout"), x_BLD.shape, minval=low, maxval=high
            )
        # By default, TPUs round float32 operands of a product to bfloat16.
        logits_BLE = jnp.matmul(x_BLD, kernel_DE, precision=jax.lax.Precision.HIGHEST)
        if self.use_bias:
            logits_BLE += param(self, "bias", c.bias_init(), shape[1:], names[1:], role.bias())
        return constrain(logits_BLE, "batch", "length", "router")


class Experts(nn.Module):
    """Feed-forward layers of all experts; kernels are [E, inputs, outputs]."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x_BLD: jax.Array, routes: Routing, capacity: int) -> jax.Array:
        c, width = self.config, expert_width(self.config)
        parameters: dict[str, jax.Array] = {}
        names: dict[str, tuple[str, ...]] = {}
        role = Role(Kind.MATRIX, c.stream, expert=True, inputs=1)
        wide = ("gate", "in") if c.activation in GATED else ("in",)
        for name in (*wide, "out"):
            inner = name != "out"
            axes = ("experts", "embed", "mlp") if inner else ("experts", "mlp", "embed")
            shape = (x_BLD.shape[-1], width) if inner else (width, c.d_model)
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
            parameters = p[f"{name}/kernel"], p.get(f"{name}/bias")
            return product(x, *parameters, is_last=name == "out")

        name = self.config.activation
        act, gated = ACTIVATIONS[name], GATED.get(name)
        h = act(linear("gate", x)) * gated(linear("in", x)) if gated else act(linear("in", x))
        return linear("out", h)


class ExpertLinear(nn.Module):
    """Parameters of a linear map for each expert, with the names of their axes."""

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


# --- routing: functions of the router's logits


def expert_width(config: TransformerConfig) -> int:
    """Return the width of a routed expert."""
    return config.expert_d_ff or config.d_ff


def expert_capacity(factor: float, length: int, k: int, n_experts: int) -> int:
    """Return the number of tokens of a row that an expert takes.

    It is `factor` times the even share (Switch, eq. 3), at most `length`.
    """
    return min(length, ceil(factor * k * length / n_experts))


def queue_positions(experts_BLK: jax.Array, n_experts: int) -> jax.Array:
    """Return the position of each choice in the queue of its expert, per row, [B, L, K] int32.

    First choices come before second ones (GShard, Lepikhin et al. 2020, algorithm 1), tokens in
    order. The expert id `n_experts` means no expert.
    """
    B, L, K = experts_BLK.shape
    one_hot = jax.nn.one_hot(experts_BLK.swapaxes(1, 2), n_experts, dtype=jnp.int32)
    before = (one_hot.reshape(B, K * L, -1).cumsum(1)).reshape(one_hot.shape) - one_hot
    return (before * one_hot).sum(-1).swapaxes(1, 2)


def load_balancing_step(
    experts_BLK: jax.Array, is_token_BL: jax.Array, n_experts: int
) -> jax.Array:
    """Return sign(mean load − load) of each expert over the whole batch, [E] (2408.15664, alg. 1).

    Loads are counted in integers, so that the result does not depend on the mesh.
    """
    chosen_BLKE = jax.nn.one_hot(experts_BLK, n_experts, dtype=jnp.int32)
    load_E = (chosen_BLKE * is_token_BL[..., None, None]).sum((0, 1, 2))
    return jnp.sign(load_E.sum() - n_experts * load_E).astype(jnp.float32)


def expert_load(experts_BLK: jax.Array, is_token_BL: jax.Array, n_experts: int) -> jax.Array:
    """Return the fraction of a row's choices that each expert gets, before drops, [B, E]."""
    one_hot = jax.nn.one_hot(experts_BLK, n_experts).sum(2) / experts_BLK.shape[-1]
    return masked_mean(one_hot, is_token_BL)


def balance_loss(shares_BLE: jax.Array, load_BE: jax.Array, is_token_BL: jax.Array) -> jax.Array:
    """Return the load-balancing loss E Σ f_i P_i of each row, [B] (Switch, eq. 4 to 6).

    f_i is the load and P_i, which alone has a gradient, the mean probability; an even load gives 1.
    """
    share_BE = masked_mean(shares_BLE, is_token_BL)
    return shares_BLE.shape[-1] * (load_BE * share_BE).sum(-1)


def router_z_loss(logits_BLE: jax.Array, is_token_BL: jax.Array) -> jax.Array:
    """Return the mean squared log-partition of each row, [B] (ST-MoE, Zoph et al. 2022, eq. 5)."""
    return masked_mean(jax.nn.logsumexp(logits_BLE, -1, keepdims=True) ** 2, is_token_BL)[:, 0]


def masked_mean(x_BLE: jax.Array, is_token_BL: jax.Array) -> jax.Array:
    """Return the mean over the tokens of each row, [B, E]; 0 for a row without tokens."""
    mask_BL = is_token_BL.astype(jnp.float32)
    total_BE = (x_BLE * mask_BL[..., None]).sum(1)
    return total_BE / jnp.maximum(mask_BL.sum(1), 1)[:, None]
