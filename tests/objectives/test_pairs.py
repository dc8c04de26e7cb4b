"""Pairs in a row are separated as by the tokenizer of an imported folder."""

import json

import numpy as np
import pytest

from lm.config import default
from lm.data.record_store import build_record_store
from lm.data.records import open_records
from lm.data.special_tokens import special_tokens
from lm.data.tokenizers.folder import FolderTokenizer
from lm.objectives.classification import Classification
from lm.objectives.span_qa import SpanQa

tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture
def roberta(tmp_path):
    """A tokenizer of letters that puts two separators between texts."""
    names = ["<s>", "<pad>", "</s>", "<unk>", *"abcdĠ"]
    ids = {name: i for i, name in enumerate(names)}
    (tmp_path / "vocab.json").write_text(json.dumps(ids))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer"}')
    return FolderTokenizer.read(tmp_path)


def test_pair_to_classify(roberta, tmp_path):
    (tmp_path / "a.tsv").write_text("text\ttext2\tlabel\nab\tcd\t1\n")
    data = default().data
    store = build_record_store(open_records(f"tsv:{tmp_path}/a.tsv", data), roberta, tmp_path)
    special = special_tokens(roberta)
    a, b, c, d = roberta.encode("abcd")
    tokens, types = Classification(8, (), special).row(store[0])
    assert tokens.tolist() == [0, a, b, 2, 2, c, d, 2]
    assert types.tolist() == [0] * 5 + [1] * 3
    tokens, _ = Classification(7, (), special).row(store[0])
    assert tokens.tolist() == [0, a, b, 2, 2, c, 2]


@pytest.mark.parametrize(
    ("single", "pair", "text", "texts"),
    [
        ("<s> $A", "<s> $A <s> $B", [0, 1, 2], [0, 1, 2, 0, 3]),
        ("$A", "$A $B", [1, 2], [1, 2, 3]),
        ("<s> $A </s>", "<s> $A </s> $B </s>", [0, 1, 2, 4], [0, 1, 2, 4, 3, 4]),
    ],
)
def test_decoder_classifies_the_row_that_its_folder_makes(tmp_path, single, pair, text, texts):
    """As a reward model of transformers, which pools the last token."""
    ids = {"<s>": 0, "a": 1, "b": 2, "c": 3, "</s>": 4}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(ids, []))
    made.add_special_tokens(["<s>", "</s>"])
    special = [("<s>", 0), ("</s>", 4)]
    made.post_processor = tokenizers.processors.TemplateProcessing(single, pair, special)
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = FolderTokenizer.read(tmp_path)
    config = default()
    config.objective.name, config.data.sequence_length = "classification", 8
    (tmp_path / "a.tsv").write_text("text\ttext2\tlabel\nab\tc\t1\n")
    (tmp_path / "b.tsv").write_text("text\tlabel\nab\t1\n")
    for name, expected in (("a", texts), ("b", text)):
        source = open_records(f"tsv:{tmp_path}/{name}.tsv", config.data)
        store = build_record_store(source, tokenizer, tmp_path)
        objective = Classification.from_config(config, tokenizer)
        assert objective.row(store[0])[0].tolist() == expected
    config.model.family = "encoder"
    objective = Classification.from_config(config, tokenizer)
    assert len(objective.row(store[0])[0]) == 4


def test_question_and_its_context(roberta, tmp_path):
    answer = {"text": "d", "answer_start": 2}
    question = {"id": "1", "question": "b", "answers": [answer]}
    paragraph = {"context": "a d c", "qas": [question]}
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    source = open_records(f"squad:{tmp_path}/a.json", default().data)
    store = build_record_store(source, roberta, tmp_path)
    objective = SpanQa(14, 8, special_tokens(roberta))
    windows = objective.examples(store, training=True)
    row = objective.features(windows[0], np.random.default_rng(0))
    inside = row["inputs"][: row["segment_ids"].sum()].tolist()
    assert inside[:5] == [0, *roberta.encode("b"), 2, 2, *roberta.encode("a")]
    assert roberta.decode(row["inputs"][row["start"] : row["end"] + 1]).strip() == "d"
    outputs = np.zeros((1, 14, 2))
    outputs[0, row["start"], 0] = outputs[0, row["end"], 1] = 1
    assert objective.answers([store], outputs) == ["d"]
