"""Linear probes: the states they read, their results, and the control task."""

from __future__ import annotations

import flax.linen as nn
import jax
import numpy as np
import pytest

from lm.config import default, set_value
from lm.data.tokenizers.basic import WordTokenizer
from lm.errors import UserError
from lm.experiment import build_untraced
from lm.insight.capture import run_and_capture
from lm.insight.probes import LabeledRow, LabeledSpan, _control_labels, _states, probe

TINY = {
    "model.n_layers": 1,
    "model.d_model": 16,
    "model.n_heads": 2,
    "model.vocab_size": 64,
    "model.family": "encoder",
    "objective.name": "masked",
    "data.sequence_length": 32,
    "data.batch_size": 2,
}


@pytest.fixture(scope="module")
def model(tagged_file, labeled_file):
    files = tagged_file, labeled_file
    tokenizer = WordTokenizer.fit(file.read_text() for file in files)
    config = default()
    for path, value in TINY.items():
        set_value(config, path, value)
    experiment = build_untraced(config, jax.devices()[:1], tokenizer)
    tokens = np.zeros((1, 2), np.int32)
    return experiment, nn.meta.unbox(jax.jit(experiment.model.init)(jax.random.key(0), tokens))


def test_states_are_means_over_the_tokens_of_spans_in_the_order_of_the_rows(model):
    experiment, variables = model
    rows = [
        LabeledRow([5, 6, 7, 8], [LabeledSpan(1, 3, "a", "x"), LabeledSpan(3, 4, "b", "y")]),
        LabeledRow([9, 1], [LabeledSpan(0, 2, "a", "z")]),
    ]
    found = _states(experiment, variables["params"], rows, "states")

    @jax.jit
    def stream(ids):
        run = run_and_capture(experiment.model, variables, ("residual",), lambda m: m.hidden(ids))
        return run[1]["residual"][:, 0]

    for row, at in ((rows[0], [0, 1]), (rows[1], [2])):
        x_NLD = stream(np.array([row.ids]))
        for layer in range(2):
            expected = [x_NLD[layer, span.first : span.end].mean(0) for span in row.spans]
            np.testing.assert_allclose(found[layer][at], expected, atol=1e-5)


def test_words_that_always_have_one_label_are_found(model, tagged_file):
    experiment, variables = model
    report = probe(experiment, variables["params"], f"conll:{tagged_file}", None)
    assert report.classes == ["B-LOC", "B-PER", "O"]
    assert (report.n_train, report.n_held_out) == (39 * 4, 9 * 4)
    assert report.majority == 50
    assert [score.accuracy for score in report.layers] == [100, 100]
    for score in report.layers:
        assert score.selectivity == score.accuracy - score.control


def test_texts_have_the_label_of_their_row(model, labeled_file):
    experiment, variables = model
    source = f"tsv:{labeled_file}"
    report = probe(experiment, variables["params"], source, source)
    assert report.classes == ["bad", "good"]
    assert report.n_train == report.n_held_out == 48
    assert report.layers[0].accuracy == 100
    assert report.majority == pytest.approx(100 * 2 / 3)


def test_control_task_gives_a_word_type_one_label():
    spans = [[LabeledSpan(0, 1, "a", f"w{i % 50}") for i in range(400)] for _ in range(2)]
    labels = np.array(["a", "b", "b", "b"] * 100)
    first, second = _control_labels(spans, labels, 0)
    np.testing.assert_array_equal(first, second)
    assert (first[:50] == first[50:100]).all()
    assert 0.5 < (first == "b").mean() < 0.95
    assert (first != _control_labels(spans, labels, 1)[0]).any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text\tlabel\na\tx\nb\tx\n", "needs two classes"),
        ("text\tkind\na\tx\nb\ty\n", "no labels; name their column"),
        ("text\tlabel\n" + "".join(f"a{i}\t{i}\n" for i in range(300)), "240 different labels"),
    ],
)
def test_records_that_no_probe_fits_are_one_line_errors(model, tmp_path, text, message):
    experiment, variables = model
    file = tmp_path / "records.tsv"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        probe(experiment, variables["params"], f"tsv:{file}", None)


def test_held_out_records_of_other_labels_are_one_line_errors(model, tagged_file, labeled_file):
    experiment, variables = model
    sources = f"conll:{tagged_file}", f"tsv:{labeled_file}"
    with pytest.raises(UserError, match="none of its labels occur in conll:"):
        probe(experiment, variables["params"], *sources)
