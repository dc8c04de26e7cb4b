"""Chat: learned tokens, visibility, and embedding noise."""

from __future__ import annotations

import json
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import default
from lm.data.record_store import build_record_store
from lm.data.records import open_records
from lm.data.tokenizers.basic import ByteTokenizer
from lm.experiment import build_with_data
from lm.models.embedding_noise import embedding_noise
from lm.models.layers import Embedding
from lm.models.variables import Kind, Role
from lm.objectives.chat import ChatTuning
from lm.parallel.mesh import per_row_key

BYTES = ByteTokenizer()
LENGTH = 256
END = "<|im_end|>"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Three conversations, of which two fit into a row."""
    folder = tmp_path_factory.mktemp("chats")
    rows = [[("a", "first"), ("b", "second")], [("c", "third")], [("d" * 60, "fourth")]]
    lines = []
    for row in rows:
        said = [(("user", q), ("assistant", a)) for q, a in row]
        messages = [{"role": r, "content": c} for pair in said for r, c in pair]
        lines.append(json.dumps({"messages": messages}))
    (folder / "a.jsonl").write_text("\n".join(lines))
    data = default().data
    data.sequence_length = LENGTH
    records = open_records(f"jsonl:{folder}/a.jsonl", data, columns=("messages",))
    return build_record_store(records, BYTES, folder)


def rows_of(store, **options):
    objective = ChatTuning(LENGTH, **options)
    examples = objective.examples(store, training=True)
    found = [
        objective.features(examples[i], np.random.default_rng(0)) for i in range(len(examples))
    ]
    return objective, examples, found


def targets_of(row):
    """The text of the targets with a weight, by conversation."""
    return [
        BYTES.decode(row["targets"][(row["weights"] > 0) & (row["segment_ids"] == i)])
        for i in range(1, row["segment_ids"].max() + 1)
    ]


def test_targets_are_what_the_assistant_says_with_its_end(store):
    _, examples, rows = rows_of(store)
    assert sorted(len(example["records"]) for example in examples) == [1, 2]
    said = sorted(text for row in rows for text in targets_of(row))
    assert said == [f"first{END}second{END}", f"fourth{END}", f"third{END}"]
    _, _, rows = rows_of(store, last_turn_only=True)
    said = sorted(text for row in rows for text in targets_of(row))
    assert said == [f"fourth{END}", f"second{END}", f"third{END}"]


def test_each_conversation_of_a_row_is_by_itself(store):
    objective, examples, rows = rows_of(store, neftune=5.0)
    for example, row in zip(examples, rows, strict=True):
        assert {k: (x.shape, x.dtype.name) for k, x in row.items()} == objective.shapes
        for segment, record in enumerate(example["records"], start=1):
            ids, here = record.tokens["messages"], row["segment_ids"] == segment
            np.testing.assert_array_equal(row["inputs"][here], ids[:-1])
            np.testing.assert_array_equal(row["targets"][here], ids[1:])
            np.testing.assert_array_equal(row["positions"][here], np.arange(len(ids) - 1))
            assert set(row["segment_lengths"][here]) == {len(ids) - 1}
        assert not row["weights"][row["segment_ids"] == 0].any()
    _, examples, _ = rows_of(store, pack=False)
    assert [len(example["records"]) for example in examples] == [1, 1, 1]


def test_loss_is_the_cross_entropy_of_the_weighed_targets(store, make_scorer):
    objective, _, rows = rows_of(store)
    batch = {name: jnp.asarray(x)[None] for name, x in rows[0].items()}
    logits = np.random.default_rng(0).normal(size=(1, LENGTH, BYTES.vocab_size))
    model = make_scorer(logits)
    sums = objective.loss(model, batch)
    ((inputs, named),) = model.calls
    for given, name in zip(inputs, ("inputs", "positions", "segment_ids"), strict=True):
        assert given is batch[name]
    assert not named
    nats = 0.0
    for at in np.flatnonzero(rows[0]["weights"]):
        nats += np.log(np.exp(logits[0, at]).sum()) - logits[0, at, rows[0]["targets"][at]]
    assert float(sums.loss) == pytest.approx(nats, rel=1e-5)
    assert float(sums.weight) == rows[0]["weights"].sum()


def test_task_is_to_generate_the_last_message(store):
    objective = ChatTuning(LENGTH)
    prompts = [BYTES.decode(objective.source(record)) for record in store]
    assert all(prompt.endswith("<|im_start|>assistant\n") for prompt in prompts)
    assert "first" in prompts[0]
    assert [objective.reference(record) for record in store] == ["second", "third", "fourth"]


def test_template_tokens_are_added_to_the_vocabulary(make_kind):
    """Of runs, which open the tokenizer before the other defaults are filled in."""
    config = make_kind("chat decoder", model__vocab_size=0)
    experiment, dataset = build_with_data(config, jax.devices()[:1])
    names = ("<|im_start|>", "<|im_end|>")
    ids = [dataset.tokenizer.token_id(name) for name in names]
    assert ids == [experiment.config.model.vocab_size - 2, experiment.config.model.vocab_size - 1]
    assert experiment.objective.end_ids(dataset.tokenizer)[0] == ids[1]
    record = dataset.train[0][0]
    assert record.tokens["messages"][0] == ids[0]


# --- NEFTune


def look_up(alpha, lengths, ids, seed=0, row_name="vocab"):
    """Embeddings of ids, and the same with noise."""
    role, init = Role(Kind.EMBEDDING), nn.initializers.normal()
    table = Embedding(50, 8, row_name, role, init, jnp.float32)
    variables = nn.meta.unbox(table.init(jax.random.key(0), ids))
    plain = table.apply(variables, ids)
    with embedding_noise(alpha, lengths):
        noisy = table.apply(variables, ids, rngs={"dropout": per_row_key(jax.random.key(seed))})
    return np.asarray(plain), np.asarray(noisy)


def test_noise_is_uniform_and_shrinks_with_length_and_width():
    """Algorithm 1: X + alpha / sqrt(L d) U(-1, 1), with L of each conversation."""
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 50, (64, 40)))
    lengths = jnp.where(jnp.arange(40) < 10, 10, 30)[None].repeat(64, 0)
    plain, noisy = look_up(5.0, lengths, ids)
    for part, n in ((slice(0, 10), 10), (slice(10, 40), 30)):
        noise, bound = (noisy - plain)[:, part], 5 / np.sqrt(n * 8)
        assert 0.99 * bound < abs(noise).max() <= bound * (1 + 1e-5)
        assert noise.std() == pytest.approx(bound / np.sqrt(3), rel=0.03)
        assert noise.mean() == pytest.approx(0, abs=0.03 * bound)


def test_noise_is_a_function_of_step_and_row():
    ids, lengths = jnp.zeros((4, 6), int), jnp.full((4, 6), 6)
    _, first = look_up(5.0, lengths, ids)
    np.testing.assert_array_equal(look_up(5.0, lengths, ids)[1], first)
    assert (look_up(5.0, lengths, ids, seed=1)[1] != first).all()
    assert (first[0] != first[1]).all()
    np.testing.assert_array_equal(look_up(5.0, lengths[:2], ids[:2])[1], first[:2])
    for noiseless in (partial(look_up, 0.0), partial(look_up, 5.0, row_name="positions")):
        plain, same = noiseless(lengths=lengths, ids=ids)
        np.testing.assert_array_equal(plain, same)


@pytest.mark.parametrize("deterministic", [True, False])
def test_only_training_has_noise(store, make_scorer, monkeypatch, deterministic):
    seen = []
    monkeypatch.setattr(
        "lm.objectives.chat.embedding_noise",
        lambda alpha, lengths: seen.append(alpha) or embedding_noise(0.0, None),
    )
    objective, _, rows = rows_of(store, neftune=5.0)
    model = make_scorer(np.zeros((1, LENGTH, BYTES.vocab_size)))
    model.deterministic = deterministic
    objective.loss(model, {name: jnp.asarray(x)[None] for name, x in rows[0].items()})
    assert seen == [0.0 if deterministic else 5.0]
