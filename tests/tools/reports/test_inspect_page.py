"""The page of `lm inspect`, and its data files."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from lm.config import default
from lm.data.tokenizers.basic import ByteTokenizer, WordTokenizer
from lm.errors import UserError
from lm.insight.capture import require_transformer
from lm.insight.reading import Predictions, PredictionScores, Reading, make_passage, token_texts
from lm.models.classic.recurrent import RecurrentConfig
from lm.models.decoder import Decoder
from lm.models.encoder import Encoder
from lm.models.transformer_config import TransformerConfig
from lm.tools.reports import inspect_page
from lm.tools.reports.inspect_page import Text, read_texts, write_inspect_page

SIZES = {"n_layers": 2, "d_model": 8, "n_heads": 2, "n_kv_heads": 2, "head_dim": 4, "d_ff": 8}
CONFIG = TransformerConfig(**SIZES, vocab_size=258, max_length=32)


def experiment(model, family="decoder", has_perplexity=True):
    config = default()
    config.model.family = family
    objective = SimpleNamespace(has_perplexity=has_perplexity, has_prefix=False)
    return SimpleNamespace(
        model=model,
        config=config,
        objective=objective,
        tokenizer=ByteTokenizer(),
        param_shapes={"w": np.zeros(3)},
        param_infos={},
    )


def scores(n, *more):
    return PredictionScores(
        *(np.arange(n * int(np.prod(more or 1)), dtype=float).reshape(n, *more) for _ in range(3)),
        ids=np.full((n, *more, 2), ord("<")),
        probabilities=np.full((n, *more, 2), 0.5),
    )


def test_page_is_self_contained_and_its_data_are_whole(tmp_path, monkeypatch):
    passages = []

    def read(experiment, params, passage):
        passages.append(passage)
        n = len(passage.tokens)
        arrays = {
            "attention": np.tile(np.tril(np.ones((n, n))), (2, 2, 1, 1)),
            "residual": np.ones((3, n)),
            "updates": np.ones((2, 2, n)),
        }
        return Reading(passage, Predictions(scores(n), scores(n, 3), np.ones((n, n))), arrays)

    monkeypatch.setattr(inspect_page, "read", read)
    texts = [Text("a <b>"), Text("</script>", "&\n")]
    page = write_inspect_page(experiment(Decoder(CONFIG)), {}, 7, texts, tmp_path, "<run>")
    html = page.read_text()
    assert "<h1>&lt;run&gt;</h1>" in html
    assert not re.search(r"(src|href)=[\"']?(?!data:)\w", html)
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.S)[1])
    assert ["".join(text["tokens"][1:]) for text in data] == ["a <b>", "</script>&\n"]
    assert [len(text["predictions"]) for text in data] == [6, 12]
    assert data[0]["maps"][0]["picture"].startswith("data:image/png;base64,")
    found = np.load(tmp_path / "text-2.npz", allow_pickle=False)
    assert "".join(found["tokens"][1:]) == "</script>&\n"
    np.testing.assert_array_equal(found["targets"], [*passages[1].tokens[1:], -1])
    assert {"attention", "attribution", "lens_loss", "rank", "residual"} <= set(found)


def test_mask_is_written_in_the_text_of_an_encoder():
    model = Encoder(CONFIG)
    passage = make_passage(experiment(model, "encoder"), {}, ByteTokenizer(), "a [MASK].", None)
    assert passage.tokens.tolist() == [256, ord("a"), 257, ord("."), 256]
    assert passage.positions.tolist() == [1, 2, 3]
    assert passage.targets.tolist() == [ord("a"), -1, ord(".")]
    classifier = experiment(model, "encoder", has_perplexity=False)
    assert not len(make_passage(classifier, {}, ByteTokenizer(), "a", None).positions)
    headless = experiment(model, "encoder")
    headless.param_infos = {"logit_bias/bias": None}
    assert not len(make_passage(headless, {}, ByteTokenizer(), "a", None).positions)


def test_texts_of_tokens_join_to_the_text():
    text_of = token_texts(ByteTokenizer(), [256, 10, 65])
    assert "".join(map(text_of, b"a b\n")) == "a b\n"
    words = WordTokenizer(("a", "[CLS]", "<unk>", "<eos>"), (1, 1, 1, 1))
    assert list(map(token_texts(words, [0]), [0, 1])) == [" a", "[CLS]"]
    assert (text_of(256), text_of(257), text_of(300)) == ("[bos]", "[mask]", "#300")


@pytest.mark.parametrize(
    ("text", "target", "message"),
    [("a" * 32, None, "the prompt has 33 tokens; at most 32"), ("é", "b" * 31, "34 tokens")],
)
def test_text_that_does_not_fit_is_a_one_line_error(text, target, message):
    with pytest.raises(UserError, match=message):
        make_passage(experiment(Decoder(CONFIG)), {}, ByteTokenizer(), text, target)


def test_other_models_and_targets_of_encoders_are_rejected():
    with pytest.raises(UserError, match="has no Transformer layers"):
        require_transformer(SimpleNamespace(config=RecurrentConfig))
    with pytest.raises(UserError, match="encoders do not support --target"):
        make_passage(experiment(Encoder(CONFIG), "encoder"), {}, ByteTokenizer(), "a", "b")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "has no texts"),
        ("[1]", "1: not a JSON object"),
        ('{"prompt": 1}', "1: no text in a field 'prompt', 'source' or 'text'"),
        ('{"prompt": "a", "target": 2}', "1: 'target' must be a string"),
    ],
)
def test_bad_line_of_texts_is_named(tmp_path, line, message):
    file = tmp_path / "texts.jsonl"
    file.write_text(line)
    with pytest.raises(UserError, match=re.escape(message)):
        read_texts(file)
    file.write_text('{"source": "a", "target": "b"}\n\n{"text": "c"}\n')
    assert read_texts(file) == [Text("a", "b"), Text("c")]
