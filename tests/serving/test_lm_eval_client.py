"""lm-eval's client for completion servers: log-likelihoods and texts equal the run's own."""

from __future__ import annotations

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

import lm
from lm.evaluation.likelihood import score, split_request

PAIRS = [("the big model", " reads every token"), ("a small", " token of text"), ("the", " the")]


def test_log_likelihoods_and_texts_are_the_runs_own(server, tiny_run, one_device):
    url = f"{server.url}/v1/completions"
    model = LocalCompletionsAPI(
        base_url=url, model="tiny", tokenizer_backend="remote", max_length=200, batch_size=2
    )
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
    found = model.loglikelihood(requests)
    run = lm.load_run(tiny_run)
    parts = [split_request(run.experiment, run.tokenizer, *pair) for pair in PAIRS]
    # lm-eval sends no token before a text.
    parts = [part._replace(prompt=part.prompt[1:]) for part in parts]
    expected = score(run.experiment, run.params, run.tokenizer, parts)
    assert [one for one, _ in found] == pytest.approx(
        [float(one.log_likelihoods.sum()) for one in expected], abs=1e-3
    )
    assert [greedy for _, greedy in found] == [bool(one.greedy.all()) for one in expected]
    options = {"until": ["\n\n"], "max_gen_toks": 5, "temperature": 0}
    (text,) = model.generate_until([Instance("generate_until", {}, ("the big", options), 0)])
    assert len(text.encode()) >= 1
