"""Mixture files."""

import pytest

from lm.config import default, validate
from lm.config.mixture_file import read_mixture
from lm.errors import UserError

WEB = "[parts.web]\nsource = 'text:w,eb.txt'\n"
BOOKS = "[parts.books]\nsource = 'jsonl:books.jsonl'\n"


def read(tmp_path, text):
    file, config = tmp_path / "mixture.toml", default()
    file.write_text(text)
    read_mixture(config, file)
    validate(config)
    return config.data


def test_parts_have_names_weights_and_a_schedule(tmp_path):
    knots = "[[schedule]]\nstep = 0\nweb = 0.5\n[[schedule]]\nstep = 9\nbooks = 2\nweb = 1\n"
    data = read(tmp_path, f"{WEB}validation = 'text:v.txt'\n{BOOKS}{knots}")
    assert data.source == r"text:w\,eb.txt,jsonl:books.jsonl"
    assert data.validation_source == "text:v.txt"
    assert data.schedule == "0: 0.5 0; 9: 1 2"
    data = read(tmp_path, f"{WEB}weight = 3\n{BOOKS}weight = 0.5\n")
    assert (data.weights, data.epochs, data.schedule) == ((3.0, 0.5), (), "")
    assert read(tmp_path, f"\ufeff{WEB}epochs = 2\n").epochs == (2.0,)  # a byte order mark


def test_validation_data_of_the_experiment_file_stay(tmp_path):
    config = default()
    config.data.validation_source = "text:v.txt"
    (tmp_path / "mixture.toml").write_text(WEB)
    read_mixture(config, tmp_path / "mixture.toml")
    assert config.data.validation_source == "text:v.txt"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no parts"),
        ("parts = 5", "no parts"),
        ("[parts.web", "end of document"),
        (f"a = {'[' * 10000}", "recursion"),
        (f"{WEB}weight = {'9' * 400}", "too large"),
        ("[parts.web]\nsource = ''", "part web: source = ''"),
        ("[parts.step]\nsource = 'stdlib'", "a part cannot be named step"),
        ("[part.web]\nsource = 'stdlib'", "unknown key part; did you mean parts"),
        ("[parts.web]\nweight = 1", "part web has no source"),
        (f"{WEB}wieght = 1", "did you mean weight"),
        (f"{WEB}weight = '1'", "part web: weight = '1'"),
        (f"{WEB}weight = 1\n{BOOKS}", "part books has no weight"),
        (f"{WEB}weight = -1", "every weight must be above 0"),
        (f"{WEB}[[schedule]]\nweb = 1", "has no step"),
        (f"{WEB}[[schedule]]\nstep = 0\nwebb = 1", "did you mean web"),
        (f"{WEB}[[schedule]]\nstep = 0\nweb = nan", "weights must be 0 to"),
        (f"{WEB}[schedule]\nstep = 0", "must be a list"),
        (f"{WEB}epochs = 1\n[[schedule]]\nstep = 0\nweb = 1", "set only one of them"),
    ],
)
def test_errors_are_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, text)
    with pytest.raises(UserError, match="cannot be read"):
        read_mixture(default(), tmp_path / "none.toml")
