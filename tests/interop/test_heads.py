"""Heads of `transformers` classes: their logits, and the round trip."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from hf_models import (
    BART,
    BERT,
    DEBERTA,
    ELECTRA,
    GEMMA,
    GEMMA3,
    GPT2,
    LLAMA,
    MODERNBERT,
    ROBERTA,
    T5,
    build,
    safetensors,
    torch,
    transformers,
)
from hypothesis import example, given
from hypothesis import strategies as st

from lm.config.registry import listed
from lm.errors import UserError
from lm.interop import huggingface
from lm.interop.import_export import run_config
from lm.interop.model_folder import FAMILIES, open_model_folder
from lm.models.decoder import Decoder
from lm.models.encoder import Encoder
from lm.models.transformer_config import TransformerConfig

ONES = np.ones((1, 9), np.int32)
IDS = np.random.default_rng(0).integers(4, 90, (1, 9))


def of_text(model, ids):
    return model.classify(model.pooled(model.hidden(ids), ONES))


def of_tokens(model, ids):
    return model.classify(model.hidden(ids))


def of_spans(model, ids):
    return model.spans(model.hidden(ids))


def of_replaced(model, ids):
    return model.replaced(model.hidden(ids))


def of_hidden(model, ids):
    return model.hidden(ids)


def of_pairs(model, ids):
    return model.next_sentence(model.pooled(model.hidden(ids), ONES))


def of_pooler(model, ids):
    return model.pooled(model.hidden(ids), ONES)


STARTED = {"decoder_start_token_id": 5}
ENDED = dict.fromkeys(("eos_token_id", "decoder_start_token_id"), int(IDS[0, -1]))
GROUPED, FIVE, THREE = {"num_key_value_heads": 2}, {"num_labels": 5}, {"num_labels": 3}
# class: (configuration, our call, objective of the run)
HEADS = {
    "BertForTokenClassification": (BERT | FIVE, of_tokens, "token_classification"),
    "RobertaForTokenClassification": (ROBERTA | FIVE, of_tokens, "token_classification"),
    "BertForSequenceClassification": (BERT | FIVE, of_text, "classification"),
    "RobertaForSequenceClassification": (ROBERTA | FIVE, of_text, "classification"),
    "BertForQuestionAnswering": (BERT, of_spans, "span_qa"),
    "RobertaForQuestionAnswering": (ROBERTA, of_spans, "span_qa"),
    "BertForNextSentencePrediction": (BERT, of_pairs, "masked"),
    "ElectraForPreTraining": (ELECTRA, of_replaced, "replaced_tokens"),
    "ElectraModel": (ELECTRA | {"embedding_size": 32}, of_hidden, "masked"),
    "ElectraForSequenceClassification": (ELECTRA | FIVE, of_text, "classification"),
    "ElectraForTokenClassification": (ELECTRA | FIVE, of_tokens, "token_classification"),
    "ElectraForQuestionAnswering": (ELECTRA, of_spans, "span_qa"),
    "DebertaV2ForSequenceClassification": (DEBERTA | FIVE, of_text, "classification"),
    "DebertaV2ForTokenClassification": (DEBERTA | FIVE, of_tokens, "token_classification"),
    "DebertaV2ForQuestionAnswering": (DEBERTA, of_spans, "span_qa"),
    "DebertaV2Model": (DEBERTA, of_hidden, "masked"),
    "BertModel": (BERT, of_pooler, "masked"),
    "RobertaModel": (ROBERTA, of_pooler, "masked"),
    "BartForSequenceClassification": (BART | ENDED | THREE, of_text, "classification"),
    "BartForQuestionAnswering": (BART | ENDED, of_spans, "span_qa"),
    "T5ForSequenceClassification": (T5 | ENDED | STARTED | THREE, of_text, "classification"),
    "UMT5ForQuestionAnswering": (T5, of_spans, "span_qa"),
    "MT5ForTokenClassification": (T5 | {"num_labels": 1}, of_tokens, "token_classification"),
    "T5EncoderModel": (T5, of_hidden, "masked"),
    "ModernBertForSequenceClassification": (
        MODERNBERT | THREE | {"classifier_pooling": "mean", "classifier_bias": True},
        of_text,
        "classification",
    ),
    "ModernBertForTokenClassification": (MODERNBERT | FIVE, of_tokens, "token_classification"),
    "ModernBertForQuestionAnswering": (MODERNBERT, of_spans, "span_qa"),
    "LlamaForTokenClassification": (LLAMA | FIVE, of_tokens, "token_classification"),
    "GPT2ForTokenClassification": (GPT2 | FIVE, of_tokens, "token_classification"),
    "LlamaForQuestionAnswering": (LLAMA, of_spans, "span_qa"),
    "MistralForQuestionAnswering": (LLAMA | GROUPED, of_spans, "span_qa"),
    "GPT2ForSequenceClassification": (GPT2 | THREE, of_text, "classification"),
    "LlamaForSequenceClassification": (LLAMA | THREE, of_text, "classification"),
    "Qwen2ForSequenceClassification": (
        LLAMA | GROUPED | {"num_labels": 1},  # a reward model
        of_text,
        "classification",
    ),
    "GemmaForSequenceClassification": (GEMMA | THREE, of_text, "classification"),
    "Gemma3TextForSequenceClassification": (GEMMA3 | THREE, of_text, "classification"),
}


def their_outputs(model):
    with torch.no_grad():
        out = model(torch.tensor(IDS))
    if "start_logits" in out:
        return np.stack([out.start_logits, out.end_logits], axis=-1)
    if "logits" in out:
        return out.logits
    return out.pooler_output if "pooler_output" in out else out.last_hidden_state


@pytest.mark.parametrize("name", HEADS)
def test_a_head_gives_their_logits_and_goes_back(name, tmp_path):
    values, call, objective = HEADS[name]
    theirs = build(name, values | {"pad_token_id": values.get("pad_token_id", 0)})
    theirs.save_pretrained(tmp_path / "in")
    ours, params = huggingface.load(tmp_path / "in")
    found = jax.jit(lambda params: ours.apply({"params": params}, IDS, method=call))(params)
    np.testing.assert_allclose(found, their_outputs(theirs), atol=1e-4, rtol=0)
    folder = open_model_folder(tmp_path / "in")
    config = run_config(folder)
    assert config.objective.name == objective
    n_labels = values.get("num_labels", 0)
    is_number = call is of_text and n_labels == 1
    names = ",".join(f"LABEL_{i}" for i in range(n_labels)) if not is_number else ""
    assert config.data.labels == names

    about = {key: values[key] for key in ENDED if key in values}
    options = {"of_tokens": call is of_tokens, "about": about}
    options["model_type"] = folder.family.model_type  # a bare ELECTRA of one width is a BERT
    assert huggingface.save(ours, params, tmp_path / "out", **options) == name
    before, after = (
        safetensors.load_file(tmp_path / where / "model.safetensors") for where in ("in", "out")
    )
    assert {key: value.tobytes() for key, value in before.items()} == {
        key: value.tobytes() for key, value in after.items()
    }
    again, loading = getattr(transformers, name).from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(loading[what] for what in ("missing_keys", "unexpected_keys"))
    np.testing.assert_allclose(their_outputs(again.eval()), their_outputs(theirs), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "values", "left", "objective"),
    [
        ("BertForTokenClassification", BERT | FIVE, "bert.pooler.dense.", "token_classification"),
        ("BertForQuestionAnswering", BERT, "cls.predictions.", "span_qa"),
        ("RobertaForSequenceClassification", ROBERTA, "roberta.pooler.dense.", "classification"),
        ("ModernBertForSequenceClassification", MODERNBERT, "decoder.", "classification"),
        ("LlamaForSequenceClassification", LLAMA | THREE, "lm_head.", "classification"),
    ],
)
def test_heads_left_from_pretraining_are_left_out(name, values, left, objective, tmp_path):
    """As in released files, such as dslim/bert-base-NER and roberta-large-mnli."""
    build(name, values).save_pretrained(tmp_path)
    file, width = tmp_path / "model.safetensors", values["hidden_size"]
    plain, tensors = open_model_folder(tmp_path), safetensors.load_file(file)
    more = {f"{left}bias": np.ones(width, np.float32)} if left != "lm_head." else {}
    if left.endswith(("dense.", "head.")):
        more[f"{left}weight"] = np.ones((width, width), np.float32)
    safetensors.save_file(tensors | more, file)
    found = open_model_folder(tmp_path)
    assert found.unused == tuple(more)
    assert found.heads == plain.heads
    assert run_config(found).objective.name == objective
    jax.tree.map(np.testing.assert_array_equal, found.params(), plain.params())


@pytest.mark.parametrize("name", ["LlamaModel", "Gemma3TextModel"])
def test_a_decoder_without_an_output_layer_is_read_without_one(name, tmp_path):
    theirs = build(name, GEMMA3 if "Gemma" in name else LLAMA)
    theirs.save_pretrained(tmp_path)
    ours, params = huggingface.load(tmp_path)
    assert "head" not in params
    found = jax.jit(lambda params: ours.apply({"params": params}, IDS, method="hidden"))(params)
    np.testing.assert_allclose(found, their_outputs(theirs), atol=1e-4)


def test_of_two_output_biases_the_one_that_is_added_is_read(tmp_path):
    theirs = build("BertForMaskedLM", BERT | {"tie_word_embeddings": False})
    with torch.no_grad():
        theirs.cls.predictions.bias += 1
    theirs.save_pretrained(tmp_path)
    found = open_model_folder(tmp_path)
    assert found.unused == ("cls.predictions.bias",)
    added = theirs.cls.predictions.decoder.bias.detach()
    np.testing.assert_array_equal(found.params()["logit_bias"]["bias"], added)


def test_classes_exist_and_a_missing_one_is_not_replaced():
    for family in FAMILIES.values():
        assert {*family.classes.values()} <= {*dir(transformers)}
    assert FAMILIES["olmo2"].heads_of({"classifier"}, of_tokens=False) == {"classes"}
    assert FAMILIES["olmo2"].heads_of({"classifier"}, of_tokens=True) is None
    assert FAMILIES["llama"].heads_of({"classifier"}, of_tokens=True) == {"tags"}


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    """The opened folder of a classifier of texts."""
    folder = tmp_path_factory.mktemp("classifier")
    build("BertForSequenceClassification", BERT | THREE).save_pretrained(folder)
    return open_model_folder(folder)


def with_outputs(folder, n, **about):
    return replace(folder, config=replace(folder.config, n_classes=n), about=folder.about | about)


NAMES = st.one_of(st.text(max_size=5), st.text("ab,\\ \t\xa0\n", max_size=5))


@given(names=st.lists(NAMES, min_size=2, max_size=5))
@example(names=["a\\", "b"])
@example(names=["a,b", "a b", ",", "\\,", "c\\"])
def test_names_of_classes_come_in_and_go_out_or_are_refused(classifier, names):
    stated = {str(i): name for i, name in enumerate(names)}
    folder = with_outputs(classifier, len(names), id2label=stated)
    if len(set(names)) < len(names) or any(name != name.strip() or not name for name in names):
        with pytest.raises(UserError, match=r"config\.json: id2label: the name "):
            run_config(folder)
    else:
        labels = listed(run_config(folder).data.labels)
        assert huggingface.class_labels(len(names), labels)["id2label"] == stated


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        (["a", "b", "c"], "id2label is not an object with a name for each of 0 to 2"),
        ("abc", "id2label is not an object"),
        ({"0": "a", "1": "b"}, "id2label is not an object with"),
        ({"0": "a", "1": "b", "3": "c"}, "id2label is not an object with"),
        ({"0": "a", "1": 7, "2": "c"}, "the name 7 of class 1 is not a string"),
        ({"0": "a", "1": None, "2": "c"}, "the name None of class 1 is not a string"),
        ({"0": "a", "1": "b", "2": {"c": 1}}, "of class 2 is not a string"),
        ({"0": "a", "1": "", "2": "c"}, "the name '' of class 1 is empty"),
        ({"0": "a", "1": "b", "2": "a"}, "the name 'a' of class 2 is listed twice"),
        ({"0": "a", "1": "b ", "2": "c"}, "the name 'b ' of class 1 has white space at an end"),
    ],
)
def test_what_names_no_classes_is_refused(classifier, stated, expected):
    with pytest.raises(UserError, match=expected):
        run_config(with_outputs(classifier, 3, id2label=stated))


@pytest.mark.parametrize("stated", [None, {}])
def test_classes_without_names_have_those_of_transformers(classifier, stated):
    config = run_config(with_outputs(classifier, 3, id2label=stated))
    assert config.data.labels == "LABEL_0,LABEL_1,LABEL_2"


@pytest.mark.parametrize(
    ("kind", "n", "is_read"),
    [
        ("single_label_classification", 3, True),
        ("multi_label_classification", 3, True),
        ("regression", 3, True),
        ("regression", 1, True),
        ("single_label_classification", 1, False),
        ("multi_label_classification", 1, True),
        (["regression"], 1, False),
    ],
)
def test_other_problems_than_those_of_lm_are_refused(classifier, kind, n, is_read):
    folder = with_outputs(classifier, n, problem_type=kind, id2label=None)
    if is_read:
        config = run_config(folder)
        assert config.objective.name == "classification"
        assert config.data.multi_label == (
            kind.startswith("multi") or (kind, n) == ("regression", 3)
        )
        assert len(listed(config.data.labels)) == (0 if kind == "regression" else n)
        return
    with pytest.raises(UserError, match=r"config\.json: problem_type=.* is not supported with"):
        run_config(folder)


SIZES = {"n_layers": 2, "d_model": 16, "n_heads": 2, "n_kv_heads": 2, "head_dim": 8, "d_ff": 32}
SIZES |= {"vocab_size": 96, "max_length": 12}


def initialized(model, call):
    params = model.init(jax.random.key(0), IDS, method=call)["params"]
    params = jax.tree.map(np.asarray, jax.tree.map(lambda x: x, params))
    import flax.linen as nn

    return nn.meta.unbox(params)


def test_a_decoder_without_biases_goes_out_as_gpt2_with_zeros(tmp_path):
    """nanoGPT's `bias=False`."""
    model = Decoder(TransformerConfig(**SIZES, bias=False, norm_bias=False))
    params = initialized(model, model.__call__)
    assert huggingface.save(model, params, tmp_path) == "GPT2LMHeadModel"
    theirs, loading = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(loading[what] for what in ("missing_keys", "unexpected_keys"))
    expected = model.apply({"params": params}, IDS)
    np.testing.assert_allclose(their_outputs(theirs.eval()), expected, atol=1e-5)


def test_a_pooler_beside_masked_tokens_goes_out_with_a_zero_head(tmp_path):
    fixed = {"norm_placement": "post", "embedding_norm": True, "token_types": 2}
    fixed |= {"activation": "gelu_erf", "norm_eps": 1e-12}
    model = Encoder(TransformerConfig(**SIZES, **fixed))

    def call(model, ids):
        return model(ids), model.pooled(model.hidden(ids), ONES)

    params = initialized(model, call)
    assert huggingface.save(model, params, tmp_path) == "BertForPreTraining"
    theirs = transformers.BertForPreTraining.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        out = theirs(torch.tensor(IDS))
    logits, _ = model.apply({"params": params}, IDS, method=call)
    np.testing.assert_allclose(out.prediction_logits, logits, atol=1e-5)
    assert not out.seq_relationship_logits.any()
    assert "sentence_head" in huggingface.load(tmp_path)[1]


def test_a_bias_that_their_classifier_lacks_is_refused_unless_zero(tmp_path):
    model = Decoder(TransformerConfig(**SIZES, n_classes=3))
    params = initialized(model, of_text)
    assert huggingface.save(model, params, tmp_path) == "GPT2ForSequenceClassification"
    params["classifier"]["bias"] = np.ones(3, np.float32)
    with pytest.raises(
        UserError, match=r"has no classifier/bias.*optimizer.freeze=classifier/bias"
    ):
        huggingface.save(model, params, tmp_path / "other")
