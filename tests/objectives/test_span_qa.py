import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from lm.config import default
from lm.data.record_store import build_record_store
from lm.data.records import open_records
from lm.data.special_tokens import SpecialTokens, special_tokens
from lm.data.tokenizers.basic import ByteTokenizer, WordTokenizer
from lm.errors import UserError
from lm.objectives.span_qa import SpanQa, answer_tokens

CLS, SEP = 92, 93
SPECIAL = SpecialTokens(pad=0, bos=90, eos=91, cls=CLS, sep=SEP, mask=94, vocab_size=95)
RNG = np.random.default_rng(0)


@pytest.fixture
def make_store(tmp_path):
    """Make a store of (question, context, answer or None, its start); words unless bytes."""

    def make(*asked, tokenizer=None):
        questions = [
            {
                "context": context,
                "qas": [
                    {
                        "id": str(number),
                        "question": question,
                        "answers": [{"text": text, "answer_start": at}] if text else [],
                        "is_impossible": text is None,
                    }
                ],
            }
            for number, (question, context, text, at) in enumerate(asked)
        ]
        (tmp_path / "squad.json").write_text(json.dumps({"data": [{"paragraphs": questions}]}))
        records = open_records(f"squad:{tmp_path}/squad.json", default().data)
        words = (f"{question} {context}" for question, context, *_ in asked)
        return build_record_store(records, tokenizer or WordTokenizer.fit(words), tmp_path)

    return make


def rows(objective, store):
    windows = objective.examples(store, training=True)
    return [objective.features(windows[i], RNG) for i in range(len(windows))]


def test_row_is_cls_question_sep_window_sep(make_store):
    store = make_store(("x y", "a b c d e f", "d e", 6))
    ids = dict(zip("abcdefxy", range(2, 10), strict=True))
    row, last = rows(SpanQa(10, 3, SPECIAL), store)
    x, y, *context = (ids[letter] for letter in "xyabcdef")
    assert row["inputs"].tolist() == [CLS, x, y, SEP, *context[:5], SEP]
    assert row["token_types"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert row["segment_ids"].tolist() == [1] * 10
    assert (row["start"], row["end"]) == (7, 8)
    assert last["inputs"].tolist() == [CLS, x, y, SEP, *context[3:], SEP, 0, 0]
    assert last["token_types"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0, 0]
    assert last["segment_ids"].tolist() == [1] * 8 + [0] * 2
    assert (last["start"], last["end"]) == (4, 5)
    assert row["weights"] == last["weights"] == 1


def bert_windows(n_context, room, doc_stride):
    """The windows of google-research/bert, run_squad.py."""
    starts, start = [], 0
    while start < n_context:
        length = min(n_context - start, room)
        starts.append((start, length))
        if start + length == n_context:
            break
        start += min(length, doc_stride)
    return starts


@pytest.mark.parametrize(("length", "stride"), [(12, 3), (12, 5), (12, 50), (20, 1), (9, 2)])
def test_windows_match_bert(make_store, length, stride):
    sizes = [(q, c) for q in (1, 2) for c in (1, 4, 5, 6, 7, 8, 11, 13, 30)]
    texts = [("q " * q, " ".join(f"w{i}" for i in range(c)), "w0", 0) for q, c in sizes]
    store = make_store(*texts)
    objective = SpanQa(length, stride, SPECIAL)
    windows = objective.examples(store, training=False)
    expected = [
        (number, *window)
        for number, (q, c) in enumerate(sizes)
        for window in bert_windows(c, length - 3 - q, stride)
    ]
    found = []
    for i in range(len(windows)):
        example = windows[i]
        row = objective.features(example, RNG)
        n_context = int(row["token_types"].sum()) - 1
        found.append((int(example["record"].raw["id"]), example["start"], n_context))
    assert found == expected
    for index in (-1, len(windows)):
        with pytest.raises(IndexError):
            windows[index]


def test_long_questions_are_cut(make_store):
    store = make_store(("q " * 70, "a b c", "b", 2))
    for length, n_question in ((200, 64), (11, 4)):
        (row,) = rows(SpanQa(length, 8, SPECIAL), store)
        assert row["inputs"].tolist().index(SEP) == n_question + 1
        assert (row["start"], row["end"]) == (n_question + 3, n_question + 3)


CONTEXT = "In 1854-55, the (Crimean) war — “née” was;  fought. It ended"


@pytest.mark.parametrize("tokenizer", [None, ByteTokenizer()])
@pytest.mark.parametrize(
    ("answer", "covered"),
    [
        ("1854", "1854"),
        ("1854-55", "1854-55"),
        ("rime", "Crimean"),
        ("(Crimean) wa", "(Crimean) war"),
        ("née", "née"),
        (" was; ", "was;"),
        ("In", "In"),
        ("ended", "ended"),
    ],
)
def test_answer_covers_the_words_of_its_characters(make_store, answer, covered, tokenizer):
    at = CONTEXT.index(answer)
    store = make_store(("when ?", CONTEXT, answer, at), tokenizer=tokenizer)
    record = store[0]
    start, end = answer_tokens(record)
    assert CONTEXT[record.starts[start] : record.ends[end]] == covered
    objective = SpanQa(128, 64, SPECIAL)
    (example,) = objective.examples(store, training=True)
    row = objective.features(example, RNG)
    shift = objective._shift(example)
    assert (row["start"] - shift, row["end"] - shift) == (start, end)


def test_without_the_whole_answer_cls_is_the_target(make_store):
    store = make_store(
        ("x y", "a b c d e f g h", "d e", 6),
        ("x y", "a b c", None, 0),
        ("x y", "a b c", " ", 1),
    )
    objective = SpanQa(9, 4, SPECIAL)
    found = [(int(row["start"]), int(row["end"])) for row in rows(objective, store)]
    # Four tokens of context a row: "a b c d" lacks the e, "e f g h" the d; then two without answer.
    assert found == [(0, 0), (0, 0), (0, 0), (0, 0)]
    found = [(int(row["start"]), int(row["end"])) for row in rows(SpanQa(9, 2, SPECIAL), store)]
    assert found == [(0, 0), (5, 6), (0, 0), (0, 0), (0, 0)]


class Scores:
    """A model with given scores, which records its inputs."""

    def __init__(self, scores_BL2):
        self.scores_BL2 = scores_BL2

    def hidden(self, *inputs):
        self.inputs = inputs
        return inputs[0]

    def spans(self, x_BLD):
        assert x_BLD is self.inputs[0]
        return self.scores_BL2


@pytest.fixture
def batch(make_store):
    """Two rows, of 2 + 5 and 1 + 2 tokens, and an empty one; the answers begin at c and b."""
    store = make_store(("x y", "a b c d e", "c d", 4), ("x", "a b", "b", 2))
    found = rows(SpanQa(12, 8, SPECIAL), store)
    found.append({name: np.zeros_like(values) for name, values in found[0].items()})
    return {name: np.stack([row[name] for row in found]) for name in found[0]}


OPEN = [[0, 4, 5, 6, 7, 8], [0, 3, 4]]  # columns of [cls] and of the context


def test_only_cls_and_the_context_have_scores(batch):
    scores_BL2 = np.random.default_rng(1).normal(size=(3, 12, 2))
    model = Scores(jnp.asarray(scores_BL2))
    found = np.asarray(SpanQa(12, 8, SPECIAL).predict(model, batch))
    tokens, positions, segments, types = model.inputs
    assert tokens is batch["inputs"]
    assert positions is None
    assert (segments is batch["segment_ids"]) & (types is batch["token_types"])
    for row, columns in enumerate([*OPEN, [0]]):
        assert np.flatnonzero(np.isfinite(found[row, :, 0])).tolist() == columns
        np.testing.assert_allclose(found[row, columns], scores_BL2[row, columns], rtol=1e-6)
        assert (np.isneginf(found[row]).sum(0) == 12 - len(columns)).all()


def test_loss_is_the_mean_of_start_and_end(batch):
    scores_BL2 = np.random.default_rng(1).normal(size=(3, 12, 2)).astype(np.float32)
    scores_BL2[1, [4, 4], [0, 1]] = 9  # the second row is right,
    scores_BL2[0, [6, 8], [0, 1]] = 9  # the first one's start only
    objective = SpanQa(12, 8, SPECIAL)

    def loss(scores_BL2):
        sums = objective.loss(Scores(scores_BL2), batch)
        return sums.loss, sums

    gradient, sums = jax.jit(jax.grad(loss, has_aux=True))(jnp.asarray(scores_BL2))
    nats = 0.0
    for row, (columns, targets) in enumerate(zip(OPEN, [(6, 7), (4, 4)], strict=True)):
        for side, target in enumerate(targets):
            chances = scipy.special.log_softmax(scores_BL2[row, columns, side])
            nats -= chances[columns.index(target)] / 2
            expected = np.zeros(12)
            expected[columns] = np.exp(chances) / 2
            expected[target] -= 0.5
            np.testing.assert_allclose(gradient[row, :, side], expected, atol=1e-6)
    assert float(sums.loss) == pytest.approx(nats, rel=1e-5)
    assert not gradient[2].any()
    assert float(sums.weight) == 2
    assert float(sums.metrics["accuracy"]) == 1


def test_features_have_the_stated_shapes(make_store):
    objective = SpanQa(12, 8, special_tokens(ByteTokenizer()))
    row = rows(objective, make_store(("x", "a b", "b", 2)))[0]
    assert {name: (x.shape, x.dtype.name) for name, x in row.items()} == objective.shapes
    assert SpanQa(12, 8, special_tokens(None)).shapes == objective.shapes
    assert objective.n_extra_ids == 0
    assert SpanQa(12, 8, SpecialTokens(0, 0, 0, 20, 21, 0, vocab_size=20)).n_extra_ids == 2


def test_impossible_settings_are_reported(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "x", "context": "y"}\n')
    records = open_records(f"jsonl:{tmp_path}/a.jsonl", default().data)
    store = build_record_store(records, ByteTokenizer(), tmp_path)
    with pytest.raises(UserError, match=r"a\.jsonl has no answers: span_qa reads squad:FILE"):
        SpanQa(12, 8, SPECIAL).examples(store, training=True)
    with pytest.raises(UserError, match="sequence_length=4 leaves no room"):
        SpanQa(4, 8, SPECIAL)
