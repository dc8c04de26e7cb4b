import jax.numpy as jnp
import numpy as np
import pytest

from lm.data.tokenizers.basic import ByteTokenizer, WordTokenizer
from lm.data.word_vectors import WordVectors
from lm.errors import UserError
from lm.evaluation.word_scores import score_word_vectors, trained_word_vectors
from lm.models.variables import Kind, ParamInfo, Role

# At 0, 10, 90 and 180 degrees.
ANGLES = np.radians([0, 10, 90, 180])
VECTORS = WordVectors(
    ("north", "up", "east", "south"), np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)
)


def infos(*paths):
    """Roles of embeddings of tokens at the paths, and of positions."""
    role = Role(Kind.EMBEDDING, part="input")
    tables = {path: ParamInfo(role, ("vocab", "embed")) for path in paths}
    return {**tables, "positions/embedding": ParamInfo(role, (None, "embed"))}


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_vectors_of_a_run_are_the_rows_of_its_words():
    tokenizer = WordTokenizer.fit(["b b a\n"])
    table = jnp.arange(12.0).reshape(6, 2)  # two rows more than there are words
    params = {
        "tokens": {"embedding": -table},
        "words": {"rows": table},
    }  # the role tells, not the name
    vectors = trained_word_vectors(infos("words/rows"), params, tokenizer)
    assert vectors.words == ("<eos>", "<unk>", "b", "a")
    np.testing.assert_array_equal(vectors.vectors, table[:4])


def test_run_without_words_has_no_word_vectors():
    with pytest.raises(UserError, match=r"tokenizer is byte.*data\.tokenizer=words"):
        trained_word_vectors(infos("words/rows"), {}, ByteTokenizer())


@pytest.mark.parametrize("paths", [(), ("source/rows", "target/rows")])
def test_run_without_one_table_of_tokens_has_no_word_vectors(paths):
    with pytest.raises(UserError, match=f"one embedding of its input tokens, not {len(paths)}"):
        trained_word_vectors(infos(*paths), {}, WordTokenizer.fit(["a\n"]))


def test_scores_by_file_and_by_section(write):
    good = write("good.txt", "north up 9\nnorth east 5\nnorth south 1\nnorth sea 3\n")
    bad = write("bad.txt", "north up 1\nnorth south 2\n")
    # south - north + east is nearest to east itself, which is in the question; then to south.
    questions = write("q.txt", ": gram1\nnorth south east up\n: seas\nsea north sea north\n")
    assert score_word_vectors(VECTORS, [good, bad], questions) == {
        "words": 4,
        "dimensions": 2,
        "good/spearman": pytest.approx(1),
        "good/found": 3,
        "good/pairs": 4,
        "bad/spearman": pytest.approx(-1),
        "bad/found": 2,
        "bad/pairs": 2,
        **{
            f"analogies/{section}/{name}": value
            for section, asked in (("gram1", 1), ("syntactic", 1), ("total", 2))
            for name, value in (("accuracy", 100), ("found", 1), ("questions", asked))
        },
    }


def test_files_of_unknown_words_are_an_error_not_a_nan(write):
    with pytest.raises(UserError, match=r"s\.txt: 1 of 2 pairs have vectors"):
        score_word_vectors(VECTORS, [write("s.txt", "north up 1\nsea sky 2\n")])
    with pytest.raises(UserError, match=r"q\.txt: no question has vectors"):
        score_word_vectors(VECTORS, [], write("q.txt", ": a\nnorth south sea sky\n"))
