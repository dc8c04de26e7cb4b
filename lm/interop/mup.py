"""Conversion of a muP model to a plain one that computes the same function.

muP's multipliers (Yang et al. 2022, Table 8) are folded into adjacent parameters: output layers
and routers, the queries' projections or norms, and, where the output matrix is the token table, the
norm before it.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from lm.errors import UserError
from lm.interop.model_parameters import initialize
from lm.models.transformer_config import TransformerConfig, make_model
from lm.models.variables import Kind, ParamInfo, Params, flat, nested, param_infos


def without_mup(config: ConfigDict, params: Params) -> tuple[ConfigDict, Params]:
    """Return configuration and parameters of the plain model that computes the same function.

    Args:
        config: resolved configuration.
        params: its parameters, LoRA merged.

    Raises:
        UserError: a multiplier has no adjacent parameter.
    """
    if not config.model.mup_base_width:
        return config, params
    model = make_model(config, "xla", "gather")
    infos = param_infos(jax.eval_shape(lambda: initialize(model))["params"])
    leaves = flat(params)
    found = dict(_factors(model.config, {path: infos[path] for path in leaves if path in infos}))
    for path, factor in found.items():
        is_offset = model.config.norm_unit_offset and path.endswith("norm/scale")
        one = 1.0 if is_offset else 0.0
        leaves[path] = jnp.float32(factor) * (leaves[path] + one) - one
    plain = config.copy_and_resolve_references()
    plain.model.update({"mup_base_width": 0, "mup_base_head_dim": 0})
    return plain, nested(leaves)


def _factors(c: TransformerConfig, infos: dict[str, ParamInfo]) -> Iterator[tuple[str, float]]:
    """Yield the paths of parameters that absorb a multiplier, and the factor."""
    table = c.width_ratio**-0.5 if c.scale_embeddings else 1.0
    heads = 1 / c.width_ratio
    kinds = {path: info.role.kind for path, info in infos.items()}
    transform = [path for path in infos if path.startswith("transform_norm/")]  # in an encoder
    before_output = transform or [path for path in infos if _is_last_norm(path)]
    of_states = heads  # of output layers that read the norm before the output matrix
    if c.tie_embeddings:
        if not before_output:
            raise UserError(
                "--config.model.mup_base_width: the output multiplier of tied embeddings needs a "
                f"norm before them, and --config.model.norm_placement={c.norm_placement} has none"
            )
        norm = heads / table * (c.width_ratio**0.5 if c.scale_logits else 1.0)
        yield from ((path, norm) for path in before_output)
        of_states = heads if transform else heads / norm
    queries = "query_norm/" if c.qk_norm else "query/"
    for path, kind in kinds.items():
        module, _, name = path.rpartition("/")
        if kind == Kind.HEAD and name == "kernel":
            yield path, of_states
        elif kind == Kind.ROUTER:
            yield path, heads
        elif path == "tokens/embedding":
            yield path, table
        elif f"{module}/".endswith(f"/{queries}"):
            yield path, c.query_multiplier


def _is_last_norm(path: str) -> bool:
    return "/final_norm/" in path and not path.startswith("encoder/")
