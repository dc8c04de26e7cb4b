"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner.

Vyas et al. 2024 (arXiv 2409.11321), Algorithms 3 and 4. As in the released code, the first gradient
only initializes the bases; its update is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from lm.models.variables import ParamInfo, flat, nested
from lm.optim.optimizers import descend

if TYPE_CHECKING:
    from lm.optim.optimizers import ParamTable

Tree = Any
Arrays = dict[str, jax.Array]


class SoapState(NamedTuple):
    """State of SOAP; each tree holds all parameters, or those with a basis on that side.

    Attributes:
        step: number of updates so far.
        mu: first moments.
        nu: second moments of rotated gradients.
        left: moving averages of G Gᵀ, [stacked…, inputs, inputs].
        right: moving averages of Gᵀ G, [stacked…, outputs, outputs].
        left_basis: eigenvectors of `left`, as columns.
        right_basis: eigenvectors of `right`.
    """

    step: jax.Array
    mu: Tree
    nu: Tree
    left: Tree
    right: Tree
    left_basis: Tree
    right_basis: Tree


def soap(
    schedule: optax.Schedule, options: ConfigDict, table: ParamTable
) -> optax.GradientTransformation:
    """Build SOAP for matrices and Adam for all other parameters."""
    return descend(schedule, options, table, scale_by_soap(options.soap, table.infos))


def scale_by_soap(
    options: ConfigDict, infos: Mapping[str, ParamInfo]
) -> optax.GradientTransformation:
    """Build the update direction of SOAP.

    Args:
        options: section "optimizer.soap" of the configuration.
        infos: roles of the parameters, by path.
    """
    b1, b2 = options.b1, options.b2

    def init(params: Tree) -> SoapState:
        sides: tuple[Arrays, Arrays] = ({}, {})
        for path, x in flat(params).items():
            *stacked, n_in, n_out = _matrix_shape(infos[path], x.shape)
            if infos[path].role.inputs:
                for side, size in zip(sides, (n_in, n_out), strict=True):
                    if size <= options.max_dim:
                        side[path] = jnp.zeros((*stacked, size, size))
        left, right = map(nested, sides)
        mu, nu, left_basis, right_basis = (
            jax.tree.map(jnp.zeros_like, tree) for tree in (params, params, left, right)
        )
        return SoapState(jnp.zeros((), jnp.int32), mu, nu, left, right, left_basis, right_basis)

    def update(grads: Tree, state: SoapState, params: Tree = None) -> tuple[Tree, SoapState]:
        t, is_first = state.step, state.step == 0
        sides = flat(state.left), flat(state.right)
        bases = flat(state.left_basis), flat(state.right_basis)
        mu, nu, u = flat(state.mu), flat(state.nu), flat(grads)
        for path, grad in flat(grads).items():
            shape = _matrix_shape(infos[path], grad.shape)
            q = bases[0].get(path), bases[1].get(path)
            rotated = _rotate(grad.reshape(shape), *q, back=False).reshape(grad.shape)
            m = b1 * mu[path] + (1 - b1) * grad
            v = b2 * nu[path] + (1 - b2) * jnp.square(rotated)
            mu[path], nu[path] = (jnp.where(is_first, 0, x) for x in (m, v))
            # The first step is skipped, so bias corrections count from the second one.
            fast, slow = (1 - b ** jnp.maximum(t, 1) for b in (b1, b2))
            n = _rotate((m / fast).reshape(shape), *q, back=False)
            n = n / (jnp.sqrt(v / slow).reshape(shape) + options.eps)
            u[path] = jnp.where(is_first, 0, _rotate(n, *q, back=True).reshape(grad.shape))
            for side, letters in zip(sides, ("...mi,...ni", "...im,...in"), strict=True):
                if path in side:
                    g = grad.reshape(shape)
                    outer = _product(f"{letters}->...mn", g, g)
                    side[path] = b2 * side[path] + (1 - b2) * outer
        case = jnp.where(is_first, 2, t % options.every == 0)
        new = jax.lax.switch(case, (_keep, _refresh, _eigenvectors), sides, bases)
        trees = map(nested, (u, mu, nu, *sides, *new))
        updates, *rest = trees
        return updates, SoapState(t + 1, *rest)

    return optax.GradientTransformation(init, update)


def _matrix_shape(info: ParamInfo, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a parameter viewed as matrices, [stacked…, inputs, outputs]."""
    first, second = info.n_stacked, info.n_stacked + info.role.inputs
    return (*shape[:first], prod(shape[first:second]), prod(shape[second:]))


def _product(letters: str, *arrays: jax.Array) -> jax.Array:
    return jnp.einsum(letters, *arrays, precision="highest")


def _rotate(x: jax.Array, left: jax.Array | None, right: jax.Array | None, back: bool) -> jax.Array:
    """Return Leftᵀ x Right, or the inverse rotation if `back`; None is the identity."""
    if left is not None:
        x = _product("...mi,...in->...mn" if back else "...im,...in->...mn", left, x)
    if right is not None:
        x = _product("...mi,...ni->...mn" if back else "...mi,...in->...mn", x, right)
    return x


Bases = tuple[Arrays, Arrays]


def _keep(sides: Bases, bases: Bases) -> Bases:
    return bases


def _refresh(sides: Bases, bases: Bases) -> Bases:
    """Update eigenvectors by one step of orthogonal iteration (Algorithm 4)."""

    def step(p: jax.Array, q: jax.Array) -> jax.Array:
        return jnp.linalg.qr(_product("...mi,...in->...mn", p, q))[0]

    return jax.tree.map(partial(_by_matrix, step), sides, bases)


def _eigenvectors(sides: Bases, bases: Bases) -> Bases:
    """Return eigenvectors in order of descending eigenvalues."""

    def decompose(p: jax.Array, q: jax.Array) -> jax.Array:
        return jnp.linalg.eigh(p)[1][..., ::-1]

    return jax.tree.map(partial(_by_matrix, decompose), sides, bases)


def _by_matrix(function: Callable[..., jax.Array], p: jax.Array, q: jax.Array) -> jax.Array:
    """Apply `function` to stacks of matrices; on CPU one matrix at a time.

    Batched LAPACK calls deadlock there, waiting for each other's threads (JAX 0.10).
    """

    def in_turn(p: jax.Array, q: jax.Array) -> jax.Array:
        flat_p, flat_q = (x.reshape(-1, *x.shape[-2:]) for x in (p, q))
        return jax.lax.map(lambda pair: function(*pair), (flat_p, flat_q)).reshape(q.shape)

    return jax.lax.platform_dependent(p, q, cpu=in_turn, default=function)
