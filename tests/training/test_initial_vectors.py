"""A token table that starts from a GloVe file."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lm.data.dataset import open_dataset
from lm.errors import UserError
from lm.experiment import build, record_columns
from lm.models.variables import flat
from lm.training.warm_start import initial_state

TOKENS = "tokens/embedding"

VECTORS = """good 1 2 3 4 5 6 7 8
bad -1 -2 -3 -4 -5 -6 -7 -8
london .5 .5 .5 .5 .5 .5 .5 .5
unused 9 9 9 9 9 9 9 9
"""


@pytest.fixture
def start(tiny_config, tmp_path):
    """Experiment, parameters by path, tokenizer and what is reported of a fresh start."""
    (tmp_path / "a.tsv").write_text("text\tlabel\ngood film\t1\nbad London film\t0\n")
    (tmp_path / "glove.txt").write_text(VECTORS)

    def start(n_devices=1, **changes):
        values = {
            "objective__name": "classification",
            "model__family": "lstm",
            "model__d_model": 8,
            "model__init_std": 0.1,
            "data__source": "tsv:a.tsv",
            "data__directory": str(tmp_path),
            "data__tokenizer": "words",
            "data__validation_fraction": 0.0,
            "data__labels": "0,1",
            "init__vectors": "glove.txt",
        }
        config = tiny_config(**values | changes)
        experiment = build(config, jax.devices()[:n_devices])
        tokenizer = open_dataset(experiment.config.data, record_columns(config)).tokenizer
        said: list[str] = []
        state = initial_state(experiment, tokenizer, said.append)
        return experiment, flat(jax.device_get(state.params)), tokenizer, said

    return start


@pytest.mark.parametrize("family", ["lstm", "encoder"])
def test_words_of_the_file_get_their_vectors(start, family):
    _, params, tokenizer, said = start(model__family=family)
    table_VD = params[TOKENS]
    rows = dict(zip(tokenizer.words, table_VD, strict=False))
    np.testing.assert_array_equal(rows["good"], np.arange(1, 9))
    np.testing.assert_array_equal(rows["bad"], -np.arange(1, 9))
    np.testing.assert_array_equal(rows["London"], np.full(8, 0.5))  # by its lower-cased form
    others = np.stack([rows[word] for word in ("<eos>", "<unk>", "film")])
    assert np.abs(others).max() < 0.5
    assert others.std() == pytest.approx(0.1, rel=0.5)
    assert table_VD.dtype == np.float32
    assert said == ["glove.txt: vectors for 3 of 6 words"]

    _, fresh, _, said = start(model__family=family, init__vectors="")
    assert not said
    assert fresh.keys() == params.keys()
    assert fresh[TOKENS].shape == table_VD.shape
    for path in fresh.keys() - {TOKENS}:
        assert fresh[path].tobytes() == params[path].tobytes(), path


def test_embedding_table_is_sharded_by_the_mesh(start):
    _, params, *_ = start(8, parallel__preset="fsdp", model__vocab_size=16)
    _, alone, *_ = start(1, model__vocab_size=16)
    np.testing.assert_array_equal(params[TOKENS], alone[TOKENS])


def test_pieces_of_other_vocabularies_are_looked_up_too(start, tmp_path):
    (tmp_path / "letters.txt").write_text(f"f {'2 ' * 8}\nfilm {'3 ' * 8}\n")
    _, params, tokenizer, said = start(data__tokenizer="char", init__vectors="letters.txt")
    assert said == [f"letters.txt: vectors for 1 of {tokenizer.vocab_size} words"]
    assert (params[TOKENS][tokenizer.token_id("f")] == 2).all()


def test_different_width_is_reported(start):
    with pytest.raises(UserError, match=r"has vectors of dimension 8: set --config\.model"):
        start(model__d_model=16)
    with pytest.raises(UserError, match=r"no file matches .none\.txt"):
        start(init__vectors="none.txt")
