"""Multi-token prediction against its formula, computed from the modules' own parameters."""

from __future__ import annotations

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.models.ahead_modules import without_ahead
from lm.models.decoder import Decoder
from lm.models.transformer_config import TransformerConfig
from lm.objectives.multi_token import MultiToken

SIZES = {
    **{"n_layers": 2, "d_model": 16, "n_heads": 2, "n_kv_heads": 2, "head_dim": 8, "d_ff": 24},
    **{"vocab_size": 11, "max_length": 12, "norm": "rmsnorm", "bias": False},
}
MODEL = Decoder(TransformerConfig(**SIZES, positions="rotary", tie_embeddings=False))


def batch_of(tokens, documents):
    """Batch of rows of L + 1 tokens; a document's last token has no target."""
    tokens, documents = np.asarray(tokens), np.asarray(documents)
    starts = np.concatenate([[True], documents[1:] != documents[:-1]])
    positions = np.arange(len(tokens)) - np.maximum.accumulate(
        np.where(starts, np.arange(len(tokens)), 0)
    )
    return {
        "inputs": tokens[None, :-1],
        "targets": tokens[None, 1:],
        "weights": np.float32(documents[1:] == documents[:-1])[None],
        "segment_ids": documents[None, :-1],
        "positions": positions[None, :-1],
    }


TOKENS, DOCUMENTS = [3, 5, 7, 1, 2, 9, 4, 8, 6, 10], [1, 1, 1, 1, 2, 2, 2, 2, 2, 2]
BATCH = batch_of(TOKENS, DOCUMENTS)


@pytest.fixture(scope="module")
def trained():
    """An objective with two modules, and random parameters of the model with them."""
    objective = MultiToken(9, depth=2, weight=0.25)
    variables = nn.meta.unbox(nn.init(objective.loss, MODEL)(jax.random.key(0), BATCH))
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [jax.random.normal(key, x.shape) * 0.3 for key, x in zip(keys, leaves, strict=True)]
    return objective, jax.tree.unflatten(tree, drawn)


def test_loss_matches_the_report(trained):
    objective, variables = trained
    found = nn.apply(objective.loss, MODEL)(variables, BATCH)
    params = variables["params"]
    modules = params["ahead"]

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(scale)

    text = [BATCH[name] for name in ("positions", "segment_ids")]
    x = MODEL.apply(variables, BATCH["inputs"], *text, method="hidden")
    table = np.asarray(params["tokens"]["embedding"])
    losses, last = [], len(TOKENS) - 1
    for k in range(3):
        if k:
            # Beyond the end the token is 0; what comes of it is no target.
            tokens = np.asarray([TOKENS[i + k] if i + k <= last else 0 for i in range(last)])
            own = {name: modules[f"{name}_{k - 1}"] for name in ("token_norm", "norm", "in")}
            both = [
                norm(table[tokens], own["token_norm"]["scale"]),
                norm(np.asarray(x[0]), own["norm"]["scale"]),
            ]
            mixed = np.concatenate(both, -1) @ np.asarray(own["in"]["kernel"])
            one = Decoder(replace(MODEL.config, n_layers=1))
            block = {"params": {**params, "stack": modules[f"stack_{k - 1}"]}}
            x = nn.apply(stack_of, one)(block, mixed[None], *text)
        logits = np.asarray(x[0] @ params["head"]["kernel"])
        inside = [i for i in range(last - k) if DOCUMENTS[i] == DOCUMENTS[i + k + 1]]
        of_token = optax.softmax_cross_entropy_with_integer_labels(
            jnp.asarray(logits[inside]), jnp.asarray([TOKENS[i + k + 1] for i in inside])
        )
        losses.append(float(of_token.sum()))
    assert float(found.loss) == pytest.approx(losses[0] + 0.25 * (losses[1] + losses[2]) / 2)
    assert float(found.metrics["nll"]) == pytest.approx(losses[0])
    assert float(found.metrics["nll_3"]) == pytest.approx(losses[2])
    assert float(found.weight) == BATCH["weights"].sum()


def test_row_may_be_shorter_than_the_number_of_modules():
    init, batch = nn.init(MultiToken(9, depth=3).loss, MODEL), batch_of(TOKENS[:2], DOCUMENTS[:2])
    made = jax.eval_shape(init, jax.random.key(0), batch)
    assert "stack_2" in made["params"]["ahead"]


def stack_of(model, x, positions, segments):
    """The model's stack alone."""
    from lm.kernels.dot_product_attention import AttentionMask

    return model.stack(x, positions, AttentionMask(True, segments))[0]


def test_later_token_does_not_change_what_is_predicted_before_it(trained):
    """The module that predicts token i + 2 sees tokens up to i + 1 alone."""
    objective, variables = trained
    one = replace(objective, depth=1)

    def of_first(token):
        batch = batch_of([*TOKENS[:6], token, *TOKENS[7:]], [1] * 10)
        weights = np.zeros_like(batch["weights"])
        weights[0, :5] = 1.0  # targets up to token 5
        return float(nn.apply(one.loss, MODEL)(variables, batch | {"weights": weights}).loss)

    assert of_first(1) == of_first(2)


def test_decoding_and_export_leave_the_modules_out():
    one = {"ahead": 1, "tokens": 2, "model_state": {"ahead": 3, "stack": 4}}
    assert without_ahead(one) == {"tokens": 2, "model_state": {"stack": 4}}
