"""Canaries: planting and exposure; extraction of training text."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.config import default, validate
from lm.data.canaries import Planted, canary_lines, plant, repeats_of
from lm.data.sources import Chunk, cut_document
from lm.data.tokenizers.basic import ByteTokenizer
from lm.errors import UserError
from lm.evaluation.safety.memorization import Canaries, exposure, overlap
from lm.evaluation.safety.suite import Subject


def test_exposure_of_a_worked_example():
    # log2 |R| - log2 rank: of 1,000 candidates 9.97 bits for the most likely, 1 for the median.
    others = np.arange(-1000.0, -1.0)  # 999 others of a space of 1,000
    assert exposure(0.0, others) == pytest.approx(9.96578, abs=1e-5)
    assert exposure(-500.5, others) == pytest.approx(1.0)  # rank 500 of 1,000
    assert exposure(-2000.0, others) == 0.0
    assert exposure(-2.0, np.full(999, -2.0)) == 0.0  # a model that gives equal likelihoods


class Text:
    """Corpus of some documents, in chunks."""

    name, digest, size = "text", "0", 100

    def __init__(self, documents):
        self.documents = documents

    def chunks(self):
        for document in self.documents:
            yield from cut_document([document])


@given(st.lists(st.text("ab \n", min_size=1), min_size=1, max_size=5), st.integers(1, 9))
def test_every_copy_is_a_line_of_its_own_and_the_text_stays(documents, n):
    lines = tuple(f"<{i}>" for i in range(n)) * 2
    planted = list(Planted(Text(documents), lines).chunks())
    assert [c.first for c in planted] == [c.first for c in Text(documents).chunks()]
    rows = [row for chunk in planted for row in chunk.text.split("\n")]
    assert Counter(row for row in rows if "<" in row) == Counter(lines)
    left = ["\n".join(r for r in c.text.split("\n") if "<" not in r) for c in planted]
    assert left == documents


def test_line_after_an_unfinished_chunk_is_counted():
    class Cut(Text):
        def chunks(self):
            yield Chunk("aaa", True, False)
            yield Chunk("bbb", False, True)

    text = "".join(chunk.text for chunk in Planted(Cut([]), ("<0>", "<1>", "<2>")).chunks())
    assert sorted(row for row in text.split("\n") if row[:1] == "<") == ["<0>", "<1>", "<2>"]


def data_of(**values):
    config = default()
    for name, value in {"canaries": 4, "canary_format": "code ### end", **values}.items():
        config.data[name] = value
    return config.data


def test_canaries_follow_from_the_format_alone():
    data = data_of(canary_repeats=(1.0, 5.0))
    planted, unplanted = canary_lines(data)
    assert len({*planted, *unplanted}) == 8
    assert all(line[5:8].isdigit() and line[8:] == " end" for line in planted)
    assert repeats_of(data) == [1, 5, 1, 5]
    first, second = plant((Text(["a\nb\nc"]), Text(["d"])), data)
    assert Counter(first.lines) == dict(zip(planted, [1, 5, 1, 5], strict=True))
    assert isinstance(second, Text)
    assert first.digest != Text([]).digest != plant((Text([]),), data_of(canaries=3))[0].digest


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"canary_format": "no digit"}, "0 digits"),
        ({"canary_format": "#"}, "enough for twice"),
        ({"canary_format": "#" * 16}, "use 1 to 15"),
        ({"canary_format": "a\n##"}, "one line"),
        ({"canary_repeats": ()}, "numbers of 1 or more"),
        ({"canary_repeats": (0.0, 1.0)}, "numbers of 1 or more"),
        ({"canary_repeats": (1.5,)}, "numbers of 1 or more"),
    ],
)
def test_canaries_that_cannot_be_are_one_line_errors(values, message):
    config = default()
    config.data.canaries = 8
    for name, value in values.items():
        config.data[name] = value
    with pytest.raises(UserError, match=message):
        validate(config)


def test_canaries_in_a_corpus_of_tokens_are_rejected():
    tokens = SimpleNamespace(name="nanogpt:x", build_store=None)
    with pytest.raises(UserError, match="nanogpt:x is pretokenized"):
        plant((tokens,), data_of())


def test_planted_canaries_are_found_and_others_are_not():
    class Memory(Subject):
        """Model that memorizes canaries that occur often in the text."""

        def log_likelihoods(self, pairs):
            planted = dict(zip(canary_lines(data)[0], repeats_of(data), strict=True))
            draw = np.random.default_rng(0)
            return np.array([planted.get(a + b, 0) + draw.uniform(0, 2) for a, b in pairs])

    data = data_of(canary_repeats=(1.0, 9.0), canaries=40, canary_format="### ok")
    config = default()
    config.data = data
    config.safety.candidates = 500
    found = Canaries().measure(Memory(SimpleNamespace(config=config), {}, ByteTokenizer()))
    assert found["candidates"] > 400
    assert found["exposure/9"] == pytest.approx(found["exposure_largest"])
    assert found["found"] >= 50
    assert found["found_unplanted"] <= 5
    assert 0.8 < found["exposure_unplanted"] < 2.2  # log2 e by chance


def test_overlap_is_the_share_of_the_texts_n_grams():
    assert overlap([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]) == 1
    assert overlap([1, 2, 3, 4, 5], [9, 1, 2, 3, 4]) == 0.5
    assert overlap([1, 2, 3, 4, 5], []) == 0


def test_extraction_and_canaries_of_a_run(evaluate):
    keys = {"safety.prompt_tokens": 8, "safety.new_tokens": 8, "safety.extracts": 4}
    out = evaluate("--safety", "extraction", **keys)
    for name in ("samples = 4", "samples_validation = 4", "verbatim = ", "overlap_validation = "):
        assert f"eval/safety/extraction/{name}" in out
    assert "the context holds 32" in evaluate("--safety", "extraction")
    assert "the run has no canaries" in evaluate("--safety", "canaries")
