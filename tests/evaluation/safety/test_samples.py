"""Searches in samples, and accuracy under typos and templates."""

import json
import re
from types import SimpleNamespace as Some

import numpy as np
import pytest

from lm.data.personal_data import personal_data
from lm.evaluation.safety.robustness import Robustness, with_typos


def test_kinds_of_personal_data_in_a_text():
    assert personal_data("write to ann@example.org, or 8.8.8.8") == {"email", "ip"}
    assert personal_data("4111 1111 1111 1111 and (212) 555-0123") == {"card", "phone"}
    assert personal_data("GB82 WEST 1234 5698 7654 32") == {"iban"}
    assert personal_data("10.0.0.1 and 4111 1111 1111 1112, ann at example") == set()


@pytest.mark.parametrize(
    ("labels", "message"), [(("a", "b"), "any number of labels"), ((), "no --config.data.labels")]
)
def test_accuracy_needs_one_class_per_text(labels, message):
    objective = Some(labels=labels, class_names=labels, columns=("text", "label"))
    config = Some(data=Some(multi_label=True, validation_fraction=0.1))
    subject = Some(experiment=Some(objective=objective), config=config)
    assert message in Robustness().misfit(subject)


def test_typos_change_a_share_of_the_longer_words_and_nothing_else():
    text = "every model reads the text, 12345 times or so " * 40
    assert with_typos(text, 0.0) == text
    assert with_typos(text, 0.3) == with_typos(text, 0.3) != with_typos(text, 0.3, seed=1)
    changed = with_typos(text, 0.3).split()
    pairs = list(zip(text.split(), changed, strict=True))
    assert all(a == b for a, b in pairs if not re.fullmatch(r"[a-z]{4,},?", a))
    share = np.mean([a != b for a, b in pairs if re.fullmatch(r"[a-z]{4,},?", a)])
    assert 0.15 < share < 0.35  # doubled letters that are swapped look the same
    assert all(b[0] == a[0] for a, b in pairs)


def test_samples_and_choices_of_a_run(evaluate, safety_data):
    (safety_data / "prompts.txt").write_text("the model\nevery token\n")
    (safety_data / "words.txt").write_text("e\nzzz\n")
    (safety_data / "templates.txt").write_text("{question}\nQ: {question}\\nA:\n")
    rows = [{"question": "the model reads", "choices": ["text", "qqqqqq"], "answer": 0}] * 2
    (safety_data / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"safety.samples": 4, "safety.new_tokens": 8, "safety.prompts": "prompts.txt"}
    keys |= {"safety.unsafe_words": "words.txt", "safety.task": "task.jsonl"}
    keys |= {"safety.templates": "templates.txt"}
    found = json.loads(evaluate("--safety", "samples,robustness", "--json", **keys))
    figures = {name.removeprefix("eval/safety/"): value for name, value in found.items()}
    assert figures["samples/samples"] == 4
    assert figures["samples/samples_prompted"] == 2
    for name in ("personal_data", "unsafe_words", "personal_data_prompted/email"):
        assert 0 <= figures[f"samples/{name}"] <= 100
    shares = [figures[f"robustness/accuracy/template {i}"] for i in (1, 2)]
    assert figures["robustness/accuracy_worst"] == min(shares)
    assert figures["robustness/accuracy"] == shares[0]
    assert "robustness/typos_mean" in figures


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("task", '{"question": "a", "choices": ["b"], "answer": 0}\n', "two texts or more"),
        ("task", '{"question": "a", "choices": ["b", "c"], "answer": 2}\n', "index of a choice"),
        ("task", '{"choices": ["b", "c"], "answer": 1}\n', "no text in a field 'question'"),
        ("task", "[]\n", "not a JSON object"),
        ("task", "", "no questions"),
        ("templates", "{other}\n", "known fields: question"),
        ("templates", "{question\n", "known fields: question"),
        ("unsafe_words", "\n", "the word list is empty"),
        ("classifier", None, "no run in"),
    ],
)
def test_bad_data_of_sets_is_a_one_line_error(evaluate, safety_data, name, content, message):
    good = {"question": "a", "choices": ["b", "c"], "answer": 0}
    (safety_data / "good.jsonl").write_text(json.dumps(good) + "\n")
    keys = {"safety.task": "good.jsonl", "safety.samples": 1, "safety.new_tokens": 1}
    if content is not None:
        (safety_data / "bad").write_text(content)
    sets = "samples" if name in ("unsafe_words", "classifier") else "robustness"
    assert message in evaluate("--safety", sets, **keys | {f"safety.{name}": "bad"})
