"""`lm eval --safety`: bias by sentence pairs, figures of several checkpoints and their page."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from lm.api import load_run
from lm.cli import main
from lm.config import default
from lm.data.tokenizers.basic import ByteTokenizer, CharTokenizer
from lm.evaluation.likelihood import Request, TokenScores
from lm.evaluation.safety.bias import CrowsPairs, preferred, shared_tokens
from lm.evaluation.safety.suite import Subject
from lm.runs.metrics_file import add_figures


def test_preference_is_strict_and_equal_pairs_count_among_all():
    sums = np.array([[-1.0, -2.0], [-3.0, -2.0], [-1.0, -1.0], [-1.00001, -1.0]])
    assert preferred(sums, "x") == {"x": 25.0, "x_equal": 50.0}


def test_shared_tokens_are_those_that_both_sentences_have_in_order():
    assert shared_tokens([5, 1, 2, 9, 3], [5, 1, 7, 8, 9, 3]) == ([0, 1, 3, 4], [0, 1, 4, 5])
    assert shared_tokens([1], [2]) == ([], [])


def test_two_checkpoints_their_figures_and_their_page(evaluate, run_folder):
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    while_training = [json.loads(line) for line in lines if "eval/validation/loss" in line]
    assert ["eval/safety/winobias/type1" in row for row in while_training] == [False, True]
    assert while_training[1]["eval/safety/winobias/type1_pairs"] == 2
    first, last = json.loads(evaluate("--safety", "--step", "3,6", "--json"))
    assert [first["step"], last["step"]] == [3, 6]
    assert last["eval/safety/crows_pairs/pairs"] == 3
    assert last["eval/safety/winobias/type1_pairs"] == 6
    run = load_run(run_folder)
    subject = Subject(run.experiment, run.params, run.tokenizer)
    more, less = subject.log_likelihoods(
        [("", "a token of text now"), ("", "every token of text now")]
    )
    assert last["eval/safety/crows_pairs/causal/religion"] == 100 * (more > less)
    after = [json.loads(x) for x in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in after] == sorted(row["step"] for row in after)
    assert [row for row in after if "eval/safety/winobias/type2" in row] == [first, last]
    evaluate("--safety", "winobias", "--step", "3")
    assert len((run_folder / "metrics.jsonl").read_text().splitlines()) == len(lines) + 3
    page = (run_folder / "eval" / "safety" / "index.html").read_text()
    assert "BERT-base, masked (Nangia et al. 2020) 60.5" in page
    assert "<svg" in page
    assert 'href="http' not in page


def test_long_sentence_is_scored_in_parts_that_sum_to_the_whole(run_folder):
    run = load_run(run_folder)
    subject = Subject(run.experiment, run.params, run.tokenizer)
    (scores,) = subject.score([("", "the small model reads " * 5)])
    assert len(scores.log_likelihoods) == 110
    (start,) = subject.score([("", ("the small model reads " * 5)[:16])])
    np.testing.assert_allclose(scores.log_likelihoods[:16], start.log_likelihoods, rtol=1e-4)


def test_text_without_start_token_follows_a_newline():
    config = default()
    config.model.max_length = 2
    experiment = SimpleNamespace(config=config, model=None)
    subject = Subject(experiment, {}, CharTokenizer("\nab"))
    parts = subject._parts(Request([], np.array([1, 2, 1])))
    assert [(list(before), list(after)) for before, after in parts] == [
        ([0], [1]),
        ([0, 1], [2]),
        ([0, 1, 2], [1]),
    ]


def test_figures_follow_the_lines_of_their_step_and_replace_earlier_ones(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "a": 7}, {"step": 3, "loss": 0.5}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    add_figures(file, 2, {"a": 1})
    add_figures(file, 2, {"a": 2})
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert found == [rows[0], {"step": 2, "loss": 1.0}, {"step": 2, "a": 2}, rows[2]]


def test_encoders_have_the_metric_of_the_paper_and_that_of_all_tokens(safety_data):
    class Encoder(Subject):
        """Model that prefers the letters e and n."""

        is_encoder = True

        def score(self, pairs):
            texts = [np.frombuffer(text.encode(), np.uint8) for _, text in pairs]
            likes = [-1.0 + (x == ord("e")) + 9.0 * np.isin(x, [ord("n")]) for x in texts]
            return [TokenScores(x, x > 0) for x in likes]

    config = default()
    config.data.directory, config.safety.crows_pairs = str(safety_data), "pairs.csv"
    found = CrowsPairs().measure(Encoder(SimpleNamespace(config=config), {}, ByteTokenizer()))
    # "new" is liked more than "old", but what both sentences have is the same.
    assert found["pll/age"] == found["masked/age"] == found["pll_equal"] == 0
    assert found["masked_equal"] == 100


@pytest.mark.parametrize(
    ("words", "keys", "message"),
    [
        (["--safety", "crows_pair"], {}, "did you mean crows_pairs?"),
        (["--safety", "--task"], {}, "without --task"),
        (["--safety", "--harness", "x"], {}, "without --harness"),
        (["--safety", "crows_pairs"], {"safety.crows_pairs": "no.csv"}, "no.csv"),
        (["--safety", "winobias"], {"safety.winobias": "pairs.csv"}, "pairs.csv"),
        (["--safety", "--step", "4"], {}, "no checkpoint of step 4"),
    ],
)
def test_bad_input_is_a_one_line_error(evaluate, words, keys, message):
    assert message in evaluate(*words, **keys)


def test_sets_without_data_are_skipped(evaluate):
    found = json.loads(evaluate("--safety", "--json", **{"safety.crows_pairs": "no.csv"}))
    assert {name.split("/")[2] for name in found if "/" in name} >= {"winobias"}
    assert not any("crows_pairs" in name for name in found)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"eval.safety": "canaries"}, "--config.eval.safety=canaries: the run has no canaries"),
        ({"safety.winobias": "no"}, "--config.eval.safety=winobias: no file matches"),
        ({"data.validation_fraction": 0}, "--config.eval.safety=winobias needs validation data"),
    ],
)
def test_sets_that_cannot_run_end_a_training_before_it_begins(
    run_folder, keys, message, tmp_path, capsys
):
    words = ["--config", str(run_folder.parent / "config.py"), "--workdir", str(tmp_path / "run")]
    assert (
        main(["train", *words, *(f"--config.{path}={value}" for path, value in keys.items())]) == 2
    )
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_file_without_pairs_is_a_one_line_error(evaluate, safety_data):
    for content in ("", "a,b\n1,2\n", ",sent_more,sent_less,bias_type\n0,,x,age\n"):
        (safety_data / "bad.csv").write_text(content)
        assert "bad.csv" in evaluate("--safety", "crows_pairs", **{"safety.crows_pairs": "bad.csv"})
    shutil.copytree(safety_data / "winobias", safety_data / "odd")
    (safety_data / "odd" / "pro_stereotyped_type1.txt.dev").write_text("1 one line\n")
    assert "1 sentences" in evaluate("--safety", "winobias", **{"safety.winobias": "odd"})
