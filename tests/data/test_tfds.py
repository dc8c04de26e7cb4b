import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from lm.data.dataset import has_validation, open_corpus
from lm.errors import UserError

TEXTS = {
    "train": ["first text", "second\ntext", "größer"],
    "validation": ["held out"],
    "test": ["HELD OUT"],
}


class TinyTexts(tfds.core.GeneratorBasedBuilder):
    """A data set of five texts."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {"text": tfds.features.Text(), "stars": tfds.features.Scalar(dtype=np.int32)}
            ),
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in TEXTS}

    def _generate_examples(self, split):
        for index, text in enumerate(TEXTS[split]):
            yield index, {"text": text, "stars": index}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    TinyTexts(data_dir=directory, file_format="array_record").download_and_prepare()
    return str(directory)


def texts(corpus):
    return [piece.text for piece in corpus.chunks()]


def test_prepared_data_set_gives_its_splits(make_data, prepared):
    data = make_data(directory=prepared)
    assert has_validation("tfds:tiny_texts", data)
    train = open_corpus("tfds:tiny_texts", data, "train")
    validation = open_corpus("tfds:tiny_texts", data, "validation")
    assert sorted(texts(train)) == sorted(TEXTS["train"])
    assert texts(train) == texts(train)
    assert texts(validation) == TEXTS["validation"]
    same_sizes = open_corpus(
        "tfds:tiny_texts", make_data(directory=prepared, split="test"), "train"
    )
    assert len({train.digest, validation.digest, same_sizes.digest}) == 3
    assert train.digest == open_corpus("tfds:tiny_texts", data, "train").digest


def test_tfds_data_dir_is_the_default(make_data, prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", prepared)
    data = make_data(directory="", split="validation")
    assert texts(open_corpus("tfds:tiny_texts", data, "train")) == TEXTS["validation"]


def test_fraction_is_held_out_where_the_validation_split_is_missing(make_data, prepared):
    data = make_data(directory=prepared, validation_split="none", validation_fraction=0.34)
    train, validation = (open_corpus("tfds:tiny_texts", data, s) for s in ("train", "validation"))
    assert len(texts(train)) == 1
    assert sorted(texts(train) + texts(validation)) == sorted(TEXTS["train"])


def test_registered_data_set_is_read_without_tensorflow(make_data):
    with tfds.testing.mock_data(num_examples=5):
        found = texts(open_corpus("tfds:lm1b", make_data(), "train"))
    assert len(found) == 5
    assert all(isinstance(text, str) and text for text in found)
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("changes", "spec", "words"),
    [
        ({}, "tfds:nonesuch_of_all", ["tfds:nonesuch_of_all: no such data set"]),
        ({"directory": "/nowhere"}, "tfds:lm1b", ["not prepared", "/nowhere", "TFDS_DATA_DIR"]),
        ({"directory": "/nowhere"}, "tfds:tiny_texts", ["not prepared", "download_and_prepare"]),
        ({"field": "body"}, "tfds:tiny_texts", ["no field 'body' (available: stars, text)"]),
        ({"field": "stars"}, "tfds:tiny_texts", ["'stars' is not text"]),
        (
            {"split": "dev"},
            "tfds:tiny_texts",
            ["no split 'dev' (available: test, train, validation)"],
        ),
    ],
)
def test_data_set_errors_are_reported(make_data, prepared, changes, spec, words):
    with pytest.raises(UserError) as error:
        open_corpus(spec, make_data(**{"directory": prepared, **changes}), "train")
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
